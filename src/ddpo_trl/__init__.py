"""Fine-tune diffusion models with reinforcement learning: DDPO as a Hugging Face TRL-style trainer."""

from ddpo_trl.config import DDPOConfig
from ddpo_trl.doctor import PipelineReport, check_pipeline
from ddpo_trl.emoji import load_emoji_pipeline
from ddpo_trl.trainer import DDPOTrainer


__all__ = ["DDPOConfig", "DDPOTrainer", "PipelineReport", "check_pipeline", "load_emoji_pipeline"]

"""Fine-tune diffusion models with reinforcement learning: DDPO as a Hugging Face TRL-style trainer."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from ddpo_trl.checks.doctor import PipelineReport, check_pipeline
    from ddpo_trl.config import DDPOConfig
    from ddpo_trl.emoji import load_emoji_pipeline
    from ddpo_trl.trainer import DDPOTrainer

__version__ = version("ddpo_trl")

__all__ = ["DDPOConfig", "DDPOTrainer", "PipelineReport", "check_pipeline", "load_emoji_pipeline"]

# Imported when they are asked for: torch, diffusers and transformers take seconds, and `ddpo-trl --help` needs none.
_MODULES = {
    "DDPOConfig": "config",
    "DDPOTrainer": "trainer",
    "PipelineReport": "checks.doctor",
    "check_pipeline": "checks.doctor",
    "load_emoji_pipeline": "emoji",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = vars(import_module(f"{__name__}.{_MODULES[name]}"))[name]
    return globals()[name]


def __dir__() -> list[str]:
    return [*__all__, "__version__", "prompts", "rewards"]

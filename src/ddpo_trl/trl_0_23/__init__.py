"""DDPOConfig and DDPOTrainer with the arguments of TRL 0.23: scripts written for it run unchanged."""

from ddpo_trl.trl_0_23.config import TRLConfig as DDPOConfig
from ddpo_trl.trl_0_23.config import convert_config
from ddpo_trl.trl_0_23.trainer import DDPOTrainer


__all__ = ["DDPOConfig", "DDPOTrainer", "convert_config"]

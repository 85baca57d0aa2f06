"""Reward functions. Each takes `(images, prompts, metadata)`, returns one number per image, and is usable alone."""

from ddpo_trl.rewards.model import RewardModel
from ddpo_trl.rewards.pixels import brightness, colorfulness, jpeg_compressibility, jpeg_incompressibility, redness


__all__ = [
    "RewardModel",
    "brightness",
    "colorfulness",
    "jpeg_compressibility",
    "jpeg_incompressibility",
    "redness",
]

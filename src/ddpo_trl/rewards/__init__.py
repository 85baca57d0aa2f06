"""Reward functions. Each takes `(images, prompts, metadata)`, returns one number per image, and is usable alone."""

from ddpo_trl.rewards.model import RewardModel
from ddpo_trl.rewards.ocr import OCRAccuracy
from ddpo_trl.rewards.pixels import brightness, colorfulness, jpeg_compressibility, jpeg_incompressibility, redness
from ddpo_trl.rewards.safety import NSFWGate
from ddpo_trl.rewards.vlm import VLMJudge
from ddpo_trl.rewards.remote import RemoteReward


__all__ = [
    "NSFWGate",
    "OCRAccuracy",
    "RemoteReward",
    "RewardModel",
    "VLMJudge",
    "brightness",
    "colorfulness",
    "jpeg_compressibility",
    "jpeg_incompressibility",
    "redness",
]

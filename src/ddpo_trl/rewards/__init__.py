"""Reward functions. Each takes `(images, prompts, metadata)`, returns one number per image, and is usable alone."""

from ddpo_trl.rewards.aesthetic import LaionAesthetic
from ddpo_trl.rewards.clip import CLIPScore, PickScore
from ddpo_trl.rewards.emoji import EmojiAlignment
from ddpo_trl.rewards.hps import HPSv2
from ddpo_trl.rewards.image_reward import ImageReward
from ddpo_trl.rewards.model import RewardModel
from ddpo_trl.rewards.ocr import OCRAccuracy
from ddpo_trl.rewards.pixels import brightness, colorfulness, jpeg_compressibility, jpeg_incompressibility, redness
from ddpo_trl.rewards.remote import RemoteReward
from ddpo_trl.rewards.safety import NSFWGate
from ddpo_trl.rewards.siglip import AestheticPredictorV25
from ddpo_trl.rewards.vlm import VLMJudge


__all__ = [
    "AestheticPredictorV25",
    "CLIPScore",
    "EmojiAlignment",
    "HPSv2",
    "ImageReward",
    "LaionAesthetic",
    "NSFWGate",
    "OCRAccuracy",
    "PickScore",
    "RemoteReward",
    "RewardModel",
    "VLMJudge",
    "brightness",
    "colorfulness",
    "jpeg_compressibility",
    "jpeg_incompressibility",
    "redness",
]

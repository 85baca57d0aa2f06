"""DDPO learns: tiny images get brighter or darker as asked, and neither when the rewards are shuffled."""

import math
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor

from conftest import brightness, tiny_pipeline
from ddpo_trl import DDPOTrainer
from ddpo_trl.rollout.advantages import shuffled


PROMPTS = ["cat", "dog", "owl", "fox"]


# In standard deviations of the reward between images. Training brings about 0.5; with shuffled rewards, which move the
# weights as far but in no direction, the brightness drifts by up to 0.2.
LEAST_GAIN = 0.3


class Gain(NamedTuple):
    """
    Paired gain in reward on fixed prompts and seeds.

    Args:
        mean (`float`):
            In units of the standard deviation of the reward between images, before training.
        standard_error (`float`):
            Of the mean, in the same unit.
        logs (`list[dict[str, float]]`):
            Of the rounds.
    """

    mean: float
    standard_error: float
    logs: list[dict[str, float]]

    def is_learning(self) -> bool:
        return self.mean > 4 * self.standard_error and self.mean > LEAST_GAIN


def small_pipeline() -> StableDiffusionPipeline:
    """The tiny pipeline with convolutions alone: they carry the color of a random network, attention hardly does."""
    pipeline = tiny_pipeline()
    torch.manual_seed(4)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8,),
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        mid_block_type=None,
        up_block_types=("UpBlock2D",),
        cross_attention_dim=16,
        norm_num_groups=4,
    )
    pipeline.register_modules(unet=unet)
    return pipeline


def gain(make_config, sign: int, shuffle: bool = False, **settings: Any) -> Gain:
    """Trains on `sign` x brightness and measures what it brought."""

    def reward(images: Tensor, prompts: tuple[str, ...], metadata: tuple) -> Tensor:
        return sign * brightness(images, prompts, metadata)

    config = make_config(
        **{
            "num_train_epochs": 12,
            "num_inference_steps": 5,
            "guidance_scale": 1.0,
            "pipeline_kwargs": {"height": 8, "width": 8},
            "per_device_sample_batch_size": 128,
            "num_sample_batches": 2,
            "per_device_train_batch_size": 128,
            "learning_rate": 2e-2,
            **settings,
        }
    )
    adapter = LoraConfig(r=4, lora_alpha=4, target_modules=["conv1", "conv2", "conv_out"])
    trainer = DDPOTrainer(config, reward, PROMPTS, small_pipeline(), peft_config=adapter, eval_prompts=PROMPTS * 8)
    if shuffle:
        trainer.advantages.normalize = shuffled(trainer.advantages.normalize, torch.Generator().manual_seed(0))
    before = trainer.generate_samples().rewards[:, 0]
    trainer.train()
    gains = (trainer.generate_samples().rewards[:, 0] - before) / before.std()
    logs = [log for log in trainer.state.log_history if "reward" in log]
    return Gain(gains.mean().item(), gains.std().item() / math.sqrt(len(gains)), logs)


# Four updates per round: ratios leave 1, and clipping acts on some transitions and not on most.
OFF_POLICY: dict[str, Any] = {
    "num_mini_batches": 4,
    "cliprange": 0.05,
    "num_train_epochs": 9,
    "per_device_train_batch_size": 64,
}


def assert_clipping_acts(logs: list[dict[str, float]]) -> None:
    assert len(logs) == OFF_POLICY["num_train_epochs"]
    for log in logs:
        assert log["policy/approxkl_avg"] > 5e-6  # half of the mean square of log r: |r − 1| is above 0.003
        assert 0.001 < log["policy/clipfrac_avg"] < 0.5


def test_importance_sampling_learns_in_several_updates_per_round(make_config):
    learned = gain(make_config, +1, **OFF_POLICY)
    assert_clipping_acts(learned.logs)
    assert learned.is_learning()


def test_shuffled_rewards_teach_nothing_in_several_updates_per_round(make_config):
    control = gain(make_config, +1, shuffle=True, **OFF_POLICY)
    assert_clipping_acts(control.logs)
    assert not control.is_learning()
    assert abs(control.mean) < LEAST_GAIN


@pytest.mark.parametrize("loss_type, sign", [("is", -1), ("sf", +1)])
def test_training_moves_brightness_in_the_direction_of_the_reward(make_config, loss_type, sign):
    assert gain(make_config, sign, loss_type=loss_type).is_learning()


def test_shuffled_rewards_teach_nothing(make_config):
    control = gain(make_config, +1, shuffle=True)
    assert not control.is_learning()
    assert abs(control.mean) < LEAST_GAIN

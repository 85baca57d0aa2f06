"""The built-in rewards against files that PIL writes and published formulas, and what those with a model share."""

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import tiny_pipeline
from ddpo_trl import DDPOTrainer, rewards
from ddpo_trl.rewards import (
    RewardModel,
    brightness,
    colorfulness,
    jpeg_compressibility,
    jpeg_incompressibility,
    redness,
)


def noise(count: int = 3, size: int = 32) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def incompressibility(images: torch.Tensor) -> list[float]:
    return jpeg_incompressibility(images, ("",) * len(images), ({},) * len(images))


def test_jpeg_size_is_that_of_the_file_pil_writes(tmp_path):
    height, width = 24, 40
    random = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    ramp = torch.linspace(0, 1, 3 * height * width).reshape(1, 3, height, width)
    images = torch.cat([random, ramp, torch.full_like(ramp, 0.5)])
    expected = []
    for index, image in enumerate(images):
        picture = Image.new("RGB", (width, height))
        for y in range(height):
            for x in range(width):
                red, green, blue = (round(value * 255) for value in image[:, y, x].tolist())
                picture.putpixel((x, y), (red, green, blue))
        picture.save(path := tmp_path / f"{index}.jpg", quality=95)
        expected.append(path.stat().st_size / 1000)
    assert incompressibility(images) == expected


def test_compressibility_is_minus_incompressibility():
    images = noise()
    assert jpeg_compressibility(images, ("",) * 3, ({},) * 3) == [-size for size in incompressibility(images)]


def test_a_blank_image_is_smaller_than_a_noisy_one():
    blank, noisy = incompressibility(torch.cat([torch.full((1, 3, 32, 32), 0.3), noise(1)]))
    assert 0 < blank < noisy / 2


def test_values_beyond_the_range_are_clamped():
    images = noise(1)
    beyond = torch.where(images > 0.5, images + 1.0, images - 1.0)
    assert incompressibility(beyond) == incompressibility((images > 0.5).float())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_black_and_white_images_score_the_same_in_every_dtype(dtype):
    images = (noise() > 0.5).float()
    assert incompressibility(images.to(dtype)) == incompressibility(images)


def test_gradients_of_the_images_do_not_matter():
    assert incompressibility(noise().requires_grad_()) == incompressibility(noise())


def test_brightness_and_redness_of_plain_colours():
    colours = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0], [0.5, 0.5, 0.5], [0.8, 0.2, 0.4]])
    images = colours[:, :, None, None].expand(-1, -1, 4, 6)
    assert brightness(images, (), ()).tolist() == pytest.approx([1 / 3, 2 / 3, 0.5, 1.4 / 3])
    assert redness(images, (), ()).tolist() == pytest.approx([1.0, -1.0, 0.0, 0.5])


def test_colourfulness_is_the_published_formula():
    images = noise(2)
    for image, score in zip(images, colorfulness(images, ("",) * 2, ({},) * 2), strict=True):
        pixels = (image.permute(1, 2, 0).reshape(-1, 3).double() * 255).numpy()
        rg = pixels[:, 0] - pixels[:, 1]
        yb = 0.5 * (pixels[:, 0] + pixels[:, 1]) - pixels[:, 2]
        expected = np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean())
        assert score.item() == pytest.approx(expected, rel=1e-5)
    grey = torch.full((1, 3, 4, 4), 0.3)
    assert colorfulness(grey, ("",), ({},)).item() == pytest.approx(0.0, abs=1e-4)


def built_in(name: str) -> Any:
    """A reward of the package; in place of those whose weights are a download, what they have in common."""
    reward = vars(rewards)[name]
    if not isinstance(reward, type):
        return reward
    assert issubclass(reward, RewardModel) and "__call__" not in vars(reward)  # whose test is below
    return reward() if name == "EmojiAlignment" else Mean()


@pytest.mark.parametrize("name", sorted({*rewards.__all__} - {"RemoteReward", "RewardModel"}))
def test_every_built_in_reward_scores_a_video_by_the_mean_of_its_frames(name):
    reward = built_in(name)
    video = noise(6).view(2, 3, 3, 32, 32)
    prompts, metadata = ("a cat", "a dog"), ({"text": "cat"}, {"text": "dog"})
    repeated = tuple(prompts[index // 3] for index in range(6)), tuple(metadata[index // 3] for index in range(6))
    frames = torch.as_tensor(reward(video.flatten(0, 1), *repeated)).view(2, 3)
    assert torch.as_tensor(reward(video, prompts, metadata)).tolist() == pytest.approx(
        frames.mean(1).tolist(), rel=1e-5, abs=1e-6
    )


# ---- Rewards with a model ----


class Mean(RewardModel[list]):
    """Mean of the red channel in [0, 255], counting how often it is loaded and how many images come at once."""

    def load(self, device: torch.device) -> list:
        return [str(device)]

    def score(self, loaded, images, prompts, metadata):
        loaded.append((len(images), tuple(prompts), tuple(metadata)))
        return torch.tensor([float(np.asarray(image)[..., 0].mean()) for image in images])


def graded(count: int) -> torch.Tensor:
    return torch.arange(count).view(-1, 1, 1, 1).expand(-1, 3, 4, 4) / 255


def test_a_reward_model_loads_once_late_and_scores_in_batches_with_their_prompts():
    reward = Mean(batch_size=2)
    assert reward._loaded is None
    for _ in range(2):
        assert reward(graded(3), ("a", "b", "c"), (1, 2, 3)) == [0.0, 1.0, 2.0]
    assert reward._loaded == ["cpu", *[(2, ("a", "b"), (1, 2)), (1, ("c",), (3,))] * 2]


def test_a_reward_model_goes_where_it_is_told_or_where_the_images_are():
    for device, expected in ((None, "cpu"), ("meta", "meta")):
        reward = Mean(device=device)
        reward(graded(1), ("a",), ({},))
        assert reward._loaded is not None and reward._loaded[0] == expected


def test_a_video_scores_the_mean_of_its_frames():
    reward = Mean(batch_size=4)
    assert reward(graded(6).view(2, 3, 3, 4, 4), ("a", "b"), (1, 2)) == [1.0, 4.0]
    assert reward._loaded is not None and reward._loaded[1][1] == ("a", "a", "a", "b")


def test_a_pickled_reward_model_loads_again():
    reward = Mean(batch_size=2)
    reward(graded(1), ("a",), ({},))
    copy = pickle.loads(pickle.dumps(reward))
    assert copy._loaded is None and copy.batch_size == 2
    assert copy(graded(2), ("a", "b"), (1, 2)) == [0.0, 1.0]


def test_a_batch_size_of_nothing_is_refused():
    with pytest.raises(ValueError, match="batch_size is 0"):
        Mean(batch_size=0)


def test_a_reward_model_trains(make_config):
    trainer = DDPOTrainer(make_config(), Mean(batch_size=3), ["cat", "dog"], tiny_pipeline())
    trainer.train()
    assert any("rewards/Mean/mean" in log for log in trainer.state.log_history)

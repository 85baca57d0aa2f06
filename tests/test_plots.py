"""The pictures show what they are given."""

import numpy as np
import torch
from PIL import Image

from ddpo_trl.plots import ImageRow, save_comparison, save_reward_curve


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)


def test_the_comparison_shows_every_image_of_both_rows(tmp_path):
    colours = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 1]])
    images = colours[:, :, None, None].expand(4, 3, 8, 8)
    rows = [
        ImageRow(title="before", images=images[:2], rewards=torch.zeros(2)),
        ImageRow(title="after", images=images[2:], rewards=torch.ones(2)),
    ]
    save_comparison(rows, ["a", "b"], tmp_path / "rows.png")
    shown = pixels(tmp_path / "rows.png")
    for colour in colours:
        assert (shown == (colour * 255).int().numpy()).all(1).mean() > 0.02


def test_the_reward_curve_draws_rising_and_falling_rewards_differently(tmp_path):
    def centre_of_mass(rewards: list[float]) -> float:
        """Mean height, from the top, of the curve's pixels in the right third of the picture."""
        logs = [{"reward": r, "reward_std": 0.1, "episode": 10 * (i + 1)} for i, r in enumerate(rewards)]
        save_reward_curve([*logs, {"train_runtime": 1.0}], tmp_path / "curve.png")
        picture = np.asarray(Image.open(tmp_path / "curve.png").convert("RGB")).astype(int)
        right = picture[:, picture.shape[1] * 2 // 3 :]
        curve = np.abs(right - np.array([0x1F, 0x6F, 0xEB])).sum(-1) < 30
        return np.nonzero(curve)[0].mean()

    assert centre_of_mass([0.0, 1.0, 2.0]) < centre_of_mass([2.0, 1.0, 0.0])

"""The pictures show what they are given."""

import numpy as np
import pytest
from PIL import Image

from ddpo_trl.artifacts.plots import (
    CAPTION_LINES,
    COLUMN_INCHES,
    ImageRow,
    caption_text,
    save_comparison,
    save_reward_curve,
    text_width,
)


COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 0, 255)]
SQUARES = [Image.new("RGB", (8, 8), colour) for colour in COLOURS]

LONG = "a lighthouse on a cliff at dusk, in the style of an old engraving, with a ship and seven gulls " * 3
PROMPTS = [LONG, "灯台" * 60, "W" * 200, "$\\frac{1 costs $5", "", "a\nb"]


def share(path, colour: tuple[int, int, int]) -> float:
    """Of a picture's pixels."""
    shown = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    return (shown == colour).all(1).mean()


def test_the_comparison_shows_every_image_of_both_rows(tmp_path):
    rows = [
        ImageRow(title="before", images=SQUARES[:2], rewards=[0.0, 0.0]),
        ImageRow(title="after", images=SQUARES[2:], rewards=[1.0, None]),
    ]
    save_comparison(rows, ["a", "b"], tmp_path / "rows.png")
    assert all(share(tmp_path / "rows.png", colour) > 0.02 for colour in COLOURS)


@pytest.mark.parametrize("size", [(8, 8), (48, 16), (16, 48)])
def test_the_comparison_shows_every_image_whatever_its_shape(tmp_path, size):
    images = [square.resize(size) for square in SQUARES]
    rows = [ImageRow(title="row", images=images[i : i + 2], rewards=[1.0, 1.0]) for i in (0, 2)]
    save_comparison(rows, ["a", "b"], tmp_path / "rows.png")
    assert all(share(tmp_path / "rows.png", colour) > 0.02 for colour in COLOURS)


def test_pictures_of_prompts_in_any_script_are_made_without_a_warning(tmp_path, recwarn):
    row = ImageRow(title="before", images=[SQUARES[0]] * len(PROMPTS), rewards=[None] * len(PROMPTS))
    save_comparison([row], PROMPTS, tmp_path / "rows.png")
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_caption_stays_above_its_image(prompt):
    lines = caption_text(prompt).split("\n")
    assert len(lines) <= CAPTION_LINES
    assert all(text_width(line) <= 72 * COLUMN_INCHES for line in lines)


def test_a_short_prompt_is_shown_whole_and_of_a_long_one_the_beginning():
    assert caption_text("cat face") == "cat face"
    shown = caption_text(LONG)
    assert shown.replace("\n", " ").startswith("a lighthouse on a cliff")
    assert shown.endswith("…")


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

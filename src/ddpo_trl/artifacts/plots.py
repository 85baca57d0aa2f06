"""
Pictures for the model card and the docs: the reward curve, and rows of images with the same captions.

matplotlib is imported by the functions that draw, since it is optional: `pip install 'ddpo_trl[plots]'`.
"""

import os
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from PIL import Image


if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Lines of a caption; the rest of a long prompt is left out.
CAPTION_LINES = 3

COLUMN_INCHES = 1.3
CAPTION_POINTS = 9


@dataclass(frozen=True, kw_only=True)
class ImageRow:
    """
    Row of a comparison.

    Args:
        title (`str`):
            Text to the left of the row.
        images (`Sequence[PIL.Image.Image]`), rewards (`Sequence[float | None]`):
            Images, and the numbers below them; no numbers if all are `None`.
    """

    title: str
    images: Sequence[Image.Image]
    rewards: Sequence[float | None]


def can_draw() -> bool:
    """Return whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def save_reward_curve(
    log_history: Sequence[dict[str, Any]], path: str | os.PathLike[str], reward_name: str = "reward"
) -> None:
    """Draw the mean reward per round with a band of one standard deviation. Without a logged round, do nothing."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    logs = [log for log in log_history if "reward" in log]
    if not logs:
        return
    episodes = [log["episode"] for log in logs]
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.add_subplot()
    # More markers than this would look like a thick line.
    marker = "o" if len(logs) <= 50 else None
    means = [log["reward"] for log in logs]
    axes.plot(episodes, means, marker=marker, markersize=4, color="#1f6feb", label="mean of the round")
    axes.fill_between(
        episodes,
        [log["reward"] - log["reward_std"] for log in logs],
        [log["reward"] + log["reward_std"] for log in logs],
        color="#1f6feb",
        alpha=0.15,
        linewidth=0,
        label="± one standard deviation of its images",
    )
    axes.set_xlabel("reward queries (images scored)")
    axes.set_ylabel(reward_name, parse_math=False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="best")
    save(figure, path)


def save_comparison(rows: Sequence[ImageRow], captions: Sequence[str], path: str | os.PathLike[str]) -> None:
    """Draw rows of images below one another, with one caption per column."""
    from matplotlib.figure import Figure

    titles = [caption_text(caption) for caption in captions]
    lines = max(title.count("\n") for title in titles)
    tallest = max(image.height / image.width for row in rows for image in row.images)
    height = len(rows) * (COLUMN_INCHES * tallest + 0.35) + 0.2 + 0.15 * lines
    figure = Figure(figsize=(COLUMN_INCHES * len(captions) + 0.5, height), layout="constrained")
    grid = figure.subplots(len(rows), len(captions), squeeze=False)
    for row, cells in zip(rows, grid, strict=True):
        has_rewards = any(reward is not None for reward in row.rewards)
        for axes, image, reward in zip(cells, row.images, row.rewards, strict=True):
            axes.imshow(image)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_color("#cccccc")
            if has_rewards:
                axes.set_xlabel("no reward" if reward is None else f"{reward:.4g}", fontsize=CAPTION_POINTS)
        cells[0].set_ylabel(row.title, fontsize=11)
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=CAPTION_POINTS, parse_math=False)
    save(figure, path)


def caption_text(prompt: str) -> str:
    """Wrap a prompt so that it fits above its column; cut it after [`CAPTION_LINES`] lines."""
    room = 72 * COLUMN_INCHES * 0.95
    letters = max(4, min(len(prompt), int(4 * room / CAPTION_POINTS)))
    while True:
        lines = textwrap.wrap(prompt, letters, max_lines=CAPTION_LINES, placeholder="…")
        if letters == 4 or all(text_width(line) <= room for line in lines):
            return "\n".join(lines)
        letters -= 1


def text_width(text: str) -> float:
    """Return the width of a caption's line in points."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextToPath

    font = FontProperties(size=CAPTION_POINTS)
    with unknown_letters_allowed():
        return TextToPath().get_text_width_height_descent(text, font, ismath=False)[0]


def save(figure: "Figure", path: str | os.PathLike[str]) -> None:
    """Write a picture that fits a screen and can be enlarged."""
    with unknown_letters_allowed():
        figure.savefig(path, dpi=150)


@contextmanager
def unknown_letters_allowed() -> Iterator[None]:
    """Draw letters that matplotlib's font lacks as boxes, without a warning for each."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield

"""Pictures of a run: the reward curve, images before and after training, and sheets of a round's images."""

import math
import os
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextToPath
from matplotlib.ticker import MaxNLocator
from PIL import Image


# A caption has at most so many lines; the rest of a long prompt is left out.
CAPTION_LINES = 3


@dataclass(frozen=True, kw_only=True)
class Picture:
    """
    An image of a sheet.

    Args:
        image (`PIL.Image.Image`):
            RGB.
        prompt (`str`):
            What it was made from.
        reward (`float`, *optional*):
            `None` if there is none.
    """

    image: Image.Image
    prompt: str
    reward: float | None


@dataclass(frozen=True, kw_only=True)
class ImageRow:
    """
    A row of a comparison.

    Args:
        title (`str`):
            Stands left of the row.
        images (`Sequence[PIL.Image.Image]` of length `N`):
            RGB.
        rewards (`Sequence[float | None]` of length `N`):
            Printed below the images; nothing is, if all are `None`.
    """

    title: str
    images: Sequence[Image.Image]
    rewards: Sequence[float | None]


def save_reward_curve(
    log_history: Sequence[dict[str, Any]], path: str | os.PathLike[str], reward_name: str = "reward"
) -> None:
    """
    Draws the mean reward of every round, with a band of one standard deviation, against reward queries.

    Args:
        log_history (`Sequence[dict]`):
            The Trainer's logs; those with `reward`, `reward_std` and `episode` are drawn.
        path (`str` or `os.PathLike`):
            Where to save the picture.
        reward_name (`str`, *optional*, defaults to `"reward"`):
            Label of the vertical axis.
    """
    logs = [log for log in log_history if "reward" in log]
    episodes = [log["episode"] for log in logs]
    means = [log["reward"] for log in logs]
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.add_subplot()
    # So many markers would be a thick line.
    marker = "o" if len(logs) <= 50 else None
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
    """
    Lays rows of images with the same captions under one another.

    Args:
        rows (`Sequence[ImageRow]`):
            The rows, each with an image per caption.
        captions (`Sequence[str]` of length `N`):
            Titles of the columns.
        path (`str` or `os.PathLike`):
            Where to save the picture.
    """
    width = 1.3
    titles = [caption_text(caption, fontsize=9, width=width) for caption in captions]
    lines = max(title.count("\n") for title in titles)
    height = width / narrowest([row.images for row in rows]) + 0.35
    figure = Figure(
        figsize=(width * len(captions) + 0.5, height * len(rows) + 0.2 + 0.15 * lines), layout="constrained"
    )
    grid = figure.subplots(len(rows), len(captions), squeeze=False)
    for row, line in zip(rows, grid, strict=True):
        for column, axes in enumerate(line):
            show_image(axes, row.images[column])
            if any(reward is not None for reward in row.rewards):
                axes.set_xlabel(reward_text(row.rewards[column]), fontsize=9)
        line[0].set_ylabel(row.title, fontsize=11)
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=9, parse_math=False)
    save(figure, path)


def save_sheet(sections: Mapping[str, Sequence[Picture]], title: str, path: str | os.PathLike[str]) -> None:
    """
    Lays out images with their prompts and rewards.

    Args:
        sections (`Mapping[str, Sequence[Picture]]`):
            The images by what stands left of them. Each section begins a line.
        title (`str`):
            Stands above.
        path (`str` or `os.PathLike`):
            Where to save the picture.
    """
    longest = max(len(pictures) for pictures in sections.values())
    columns = min(longest, max(4, math.ceil(longest / 2)), 6)
    lines = [
        (label if first == 0 else "", pictures[first : first + columns])
        for label, pictures in sections.items()
        for first in range(0, len(pictures), columns)
    ]
    width = 2.0
    captions = [
        [caption_text(picture.prompt, fontsize=8, width=width) for picture in pictures] for _, pictures in lines
    ]
    image_height = width / narrowest([[picture.image for picture in pictures] for _, pictures in lines])
    heights = [image_height + 0.17 * max(text.count("\n") + 2 for text in texts) + 0.12 for texts in captions]
    figure = Figure(figsize=(width * columns + 0.4, sum(heights) + 0.4), layout="constrained")
    grid = figure.subplots(len(lines), columns, squeeze=False, height_ratios=heights)
    for (label, pictures), texts, cells in zip(lines, captions, grid, strict=True):
        for axes in cells[len(pictures) :]:
            axes.set_axis_off()
        for axes, picture, text in zip(cells, pictures, texts, strict=False):
            show_image(axes, picture.image)
            axes.set_xlabel(f"{reward_text(picture.reward)}\n{text}", fontsize=8, parse_math=False)
        cells[0].set_ylabel(label, fontsize=10)
    figure.suptitle(title, fontsize=12)
    save(figure, path)


def show_image(axes: Axes, image: Image.Image) -> None:
    """Draws an image in a thin frame."""
    axes.imshow(image, interpolation="auto")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_color("#cccccc")


def narrowest(rows: Sequence[Sequence[Image.Image]]) -> float:
    """The smallest ratio of width to height, for which cells have to have room."""
    return min(image.width / image.height for images in rows for image in images)


def caption_text(prompt: str, fontsize: float, width: float) -> str:
    """
    The prompt in a few lines.

    Args:
        prompt (`str`):
            What does not fit is left out.
        fontsize (`float`):
            In points.
        width (`float`):
            Of a column, in inches.
    """
    font, room = FontProperties(size=fontsize), 72 * width * 0.95
    letters = max(4, min(len(prompt), int(4 * room / fontsize)))
    while True:
        lines = textwrap.wrap(prompt, letters, max_lines=CAPTION_LINES, placeholder="…")
        if letters == 4 or all(text_width(line, font) <= room for line in lines):
            return "\n".join(lines)
        letters -= 1


def text_width(text: str, font: FontProperties) -> float:
    """In points."""
    with unknown_letters_allowed():
        return TextToPath().get_text_width_height_descent(text, font, ismath=False)[0]


def reward_text(reward: float | None) -> str:
    """Four digits."""
    return "no reward" if reward is None else f"{reward:.4g}"


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Writes a picture that fits a screen and can be zoomed in on."""
    with unknown_letters_allowed():
        figure.savefig(path, dpi=150)


@contextmanager
def unknown_letters_allowed() -> Iterator[None]:
    """A prompt in a script that matplotlib's font lacks is drawn as boxes, without a warning for each letter."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield

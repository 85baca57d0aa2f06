"""Pictures of a run: the reward curve, and images before and after training side by side."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ImageRow:
    """
    A row of a comparison.

    Args:
        title (`str`):
            Stands left of the row.
        images (`torch.Tensor` of shape `(N, 3, H, W)`):
            Values in [0, 1].
        rewards (`torch.Tensor` of shape `(N,)`):
            Printed below the images.
    """

    title: str
    images: Tensor
    rewards: Tensor


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
    axes.plot(episodes, means, marker="o", markersize=4, color="#1f6feb", label="mean of the round")
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
    axes.set_ylabel(reward_name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="best")
    figure.savefig(path, dpi=150)


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
    figure = Figure(figsize=(1.3 * len(captions) + 0.5, 1.65 * len(rows) + 0.2), layout="constrained")
    grid = figure.subplots(len(rows), len(captions), squeeze=False)
    for row, line in zip(rows, grid, strict=True):
        for column, axes in enumerate(line):
            axes.imshow(row.images[column].permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_color("#cccccc")
            axes.set_xlabel(f"{row.rewards[column]:.2f}", fontsize=9)
        line[0].set_ylabel(row.title, fontsize=11)
    for axes, caption in zip(grid[0], captions, strict=True):
        axes.set_title(caption, fontsize=9)
    figure.savefig(path, dpi=150)

"""What tests/rewards/test_remote_reward.py has `ddpo-trl serve-reward` serve."""

import asyncio
import time
from typing import Any

import torch


def obedient(images: torch.Tensor, prompts: tuple[str, ...], metadata: tuple[Any, ...]) -> list[Any]:
    """Brightness, unless the metadata of an image asks for something else."""
    rewards: list[Any] = images.flatten(1).mean(1).tolist()
    for index, wish in enumerate(metadata):
        what, value = wish.get("do"), wish.get("value")
        if what == "sleep":
            time.sleep(value)
        elif what == "raise":
            raise KeyError(value)
        elif what == "return":
            rewards[index] = {"None": None, "nan": float("nan"), "inf": float("inf")}.get(value, value)
        elif what == "count":
            rewards[index] = len(images)
        elif what == "tell":
            rewards[index] = float(len(prompts[index])) + wish["add"][1]
        elif what == "too many":
            rewards.append(0.0)
    return rewards


class Redness:
    """The mean of red, by an `async` method, which may take a while."""

    async def __call__(self, images: torch.Tensor, prompts: Any, metadata: Any) -> torch.Tensor:
        await asyncio.sleep(max(wish.get("seconds", 0) for wish in metadata))
        return images[:, 0].mean((1, 2))


class NeedsArgument(Redness):
    def __init__(self, factor: float):
        self.factor = factor


redness = Redness()
number = 3


def two(images: torch.Tensor, prompts: Any) -> list[float]:
    return [0.0] * len(images)

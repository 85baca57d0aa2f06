"""Random streams that depend on what they are for, never on what ran before: the ground of exact reproduction."""

import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from enum import IntEnum

import numpy as np
import torch


class Stream(IntEnum):
    """Purpose of a random stream."""

    SAMPLE = 0
    MICRO_BATCHES = 1
    PROMPTS = 2
    EVALUATION = 3
    CONTROL = 4
    WINDOW = 5
    PIPELINE = 6


def derived_seed(seed: int, stream: Stream, *path: int) -> int:
    """
    A seed for one purpose, for instance `derived_seed(seed, Stream.SAMPLE, round, sample_index)`.

    Seeds of different purposes or paths are independent: numpy's `SeedSequence` mixes the path into them.

    Args:
        seed (`int`):
            Seed of the run, ≥ 0.
        stream ([`Stream`]):
            The purpose.
        path (`int`):
            What distinguishes the seeds of one purpose, ≥ 0 each.

    Returns:
        `int`: In [0, 2⁶³), what `torch.Generator.manual_seed` takes.
    """
    state = np.random.SeedSequence(seed, spawn_key=(stream, *path)).generate_state(1, np.uint64)
    return int(state[0]) >> 1


def generator(seed: int, stream: Stream, *path: int) -> torch.Generator:
    """A CPU generator with the [`derived_seed`] of its arguments: the same numbers on every device."""
    return torch.Generator().manual_seed(derived_seed(seed, stream, *path))


def forked_generators(device: torch.device) -> AbstractContextManager[None]:
    """Restore torch's global generators, on the CPU and on a device, when the context is left."""
    if device.type == "cpu":
        return torch.random.fork_rng([])
    return torch.random.fork_rng([device], device_type=device.type)


@contextmanager
def randomness_untouched(device: torch.device) -> Iterator[None]:
    """Gives the global random generators back as they were: a reward function may seed them or draw from them."""
    python, numpy = random.getstate(), np.random.get_state()
    with forked_generators(device):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def randomness_lent(device: torch.device) -> Iterator[None]:
    """
    As [`randomness_untouched`], but what is inside finds other numbers every time: a prompt function goes on where it
    was, whatever reward functions did, and a reward function that draws does not draw the same in every round.
    """
    with randomness_untouched(device):
        yield
    random.random()
    np.random.random()
    torch.rand(())
    if device.type != "cpu":
        torch.rand((), device=device)

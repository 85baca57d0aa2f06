"""Random streams that depend on what they are for, never on what ran before: the ground of exact reproduction."""

from enum import IntEnum

import numpy as np
import torch


class Stream(IntEnum):
    """What a random stream is for."""

    SAMPLE = 0
    MICRO_BATCHES = 1
    PROMPTS = 2
    EVALUATION = 3
    CONTROL = 4


def generator(seed: int, stream: Stream, *path: int) -> torch.Generator:
    """
    A CPU generator for one purpose, for instance `generator(seed, Stream.SAMPLE, round, sample_index)`.

    The same arguments give the same numbers on every device and for every number of processes. The streams are
    independent: numpy's `SeedSequence` mixes the path into a seed.

    Args:
        seed (`int`):
            Seed of the run, ≥ 0.
        stream ([`Stream`]):
            The purpose.
        path (`int`):
            What distinguishes the streams of one purpose, ≥ 0 each.
    """
    state = np.random.SeedSequence(seed, spawn_key=(stream, *path)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) >> 1)  # manual_seed takes 63 bits

"""Random streams: the same for the same purpose, different for any other, untouched by the global RNG."""

import random

import numpy as np
import pytest
import torch

from ddpo_trl.seeding import Stream, derived_seed, generator


def numbers(*path: int, seed: int = 42, stream: Stream = Stream.SAMPLE, count: int = 8) -> list[float]:
    return torch.rand(count, generator=generator(seed, stream, *path)).tolist()


def test_a_stream_is_reproducible():
    assert numbers(3, 14) == numbers(3, 14)


def test_the_global_generators_neither_move_a_stream_nor_are_moved_by_it():
    expected = numbers(3, 14)
    for seed in (0, 1):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[index]
        assert numbers(3, 14) == expected
        assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # type: ignore[index]


def test_streams_of_all_purposes_seeds_and_paths_differ():
    # small integers in every place, and those that would collide were they added or concatenated
    draws = [
        tuple(numbers(first, second, seed=seed, stream=stream))
        for seed in (0, 1, 2, 11)
        for stream in Stream
        for first in (0, 1, 2, 11, 12)
        for second in (0, 1, 2, 11, 12)
    ]
    assert len(set(draws)) == len(draws) == 4 * len(Stream) * 25


@pytest.mark.parametrize(("path", "other"), [((), (0,)), ((0,), (0, 0)), ((3,), (3, 0)), ((3, 0), (3, 0, 0, 0))])
def test_paths_of_different_lengths_are_different_streams(path, other):
    assert numbers(*path) != numbers(*other)


def test_numbers_of_neighbouring_streams_are_uncorrelated():
    rows = np.array([numbers(0, index, count=400) for index in range(40)])
    correlations = np.corrcoef(rows)[np.triu_indices(40, k=1)]  # 780 pairs, each of std 1 / sqrt(400)
    assert abs(correlations.mean()) < 4 * 0.05 / 780**0.5
    assert correlations.std() == pytest.approx(0.05, rel=0.1)


def test_a_stream_can_be_made_again_from_its_seed():
    seeds = [derived_seed(42, stream, *path) for stream in Stream for path in ((), (0,), (3, 14))]
    assert len(set(seeds)) == len(seeds) == 3 * len(Stream)
    assert all(0 <= seed < 2**63 for seed in seeds)  # what torch takes, and what fits a tensor
    again = torch.Generator().manual_seed(derived_seed(42, Stream.SAMPLE, 3, 14))
    assert torch.rand(8, generator=again).tolist() == numbers(3, 14)

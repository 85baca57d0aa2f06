"""Rewards to advantages: A = (r − mean) / (std + δ), over the round, a prompt's history or a group.

The arithmetic is float64 and runs on every process over the gathered rewards of all of them.
"""

import itertools
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor


# Keeps the quotient finite when all rewards but a few are equal; far below any reward difference that matters.
DELTA = 1e-6

# Rewards whose range is below this share of their magnitude are equal: far above the rounding of float64 sums (1e-16),
# and below that of float32 (6e-8), so that rewards which a float32 model tells apart stay different.
EQUAL = 1e-8

# (N,) rewards and N keys, which say what is compared with what, to (N,) advantages
Normalizer = Callable[[Tensor, Sequence[Hashable]], Tensor]

# (N,) rewards and N keys to the sets of rewards that define a mean and a standard deviation each
Populations = Callable[[Tensor, Sequence[Hashable]], list[Tensor]]


def all_equal(rewards: Tensor) -> bool:
    """Whether `(M,)` rewards carry no information, because there is no difference, or none but rounding."""
    if not len(rewards):
        return True
    return bool(rewards.max() - rewards.min() <= EQUAL * rewards.abs().max())


def standardize(rewards: Tensor, population: Tensor | None = None) -> Tensor:
    """
    (r − mean) / (std + δ) with mean and (biased) standard deviation of `population`, by default of `rewards`.

    Where the population carries no information ([`all_equal`]), advantages are exactly zero.

    Args:
        rewards (`torch.Tensor` of shape `(N,)`):
            The rewards to standardise.
        population (`torch.Tensor` of shape `(M,)`, *optional*):
            The rewards that define mean and standard deviation.

    Returns:
        `torch.Tensor` of shape `(N,)`, float64.
    """
    rewards = rewards.double()
    population = rewards if population is None else population.double()
    if all_equal(population):
        return torch.zeros_like(rewards)
    return (rewards - population.mean()) / (population.std(correction=0) + DELTA)


def normalize_by_batch(rewards: Tensor, keys: Sequence[Hashable]) -> Tensor:
    """Standardises over all samples of the round; `keys` play no part."""
    return standardize(rewards)


def normalize_by_group(rewards: Tensor, keys: Sequence[Hashable]) -> Tensor:
    """
    Standardises over the samples of the round that share a key, by which each draw of a prompt is one group (GRPO,
    https://huggingface.co/papers/2402.03300).
    """
    advantages = torch.zeros_like(rewards, dtype=torch.float64)
    for indices in indices_by_key(keys).values():
        advantages[indices] = standardize(rewards[indices])
    return advantages


def whole_round(rewards: Tensor, keys: Sequence[Hashable]) -> list[Tensor]:
    """The one population of [`normalize_by_batch`]."""
    return [rewards]


def groups(rewards: Tensor, keys: Sequence[Hashable]) -> list[Tensor]:
    """The populations of [`normalize_by_group`]."""
    return [rewards[indices] for indices in indices_by_key(keys).values()]


def fraction_without_spread(populations: Sequence[Tensor]) -> float:
    """Share of the populations that give only zero advantages."""
    return sum(map(all_equal, populations)) / max(len(populations), 1)


def normalize_valid(normalizer: Normalizer, rewards: Tensor, keys: Sequence[Hashable]) -> Tensor:
    """
    The advantages of those rewards that are valid, as if there were no others; zero for the others.

    Args:
        normalizer (`Callable`):
            Gets to see the valid rewards only.
        rewards (`torch.Tensor` of shape `(N,)`):
            NaN where not valid.
        keys (`Sequence` of length `N`):
            What the normalizer compares by.
    """
    valid = ~rewards.isnan()
    advantages = torch.zeros_like(rewards, dtype=torch.float64)
    advantages[valid] = normalizer(rewards[valid], select(keys, valid))
    return advantages


def select(values: Sequence[Any], mask: Tensor) -> list[Any]:
    """Those of N values for which a boolean mask of shape `(N,)` is true."""
    return list(itertools.compress(values, mask.tolist()))


def keep_raw(rewards: Tensor, keys: Sequence[Hashable]) -> Tensor:
    """A = r: no baseline, no scale."""
    return rewards.double()


def shuffled(normalizer: Normalizer, generator: torch.Generator) -> Normalizer:
    """
    Hands the rewards of a round to `normalizer` in random order: the control that must not learn.

    Args:
        normalizer (`Callable`):
            What turns the shuffled rewards into advantages.
        generator (`torch.Generator`):
            Draws the permutations; the same on all processes.
    """

    def normalize(rewards: Tensor, keys: Sequence[Hashable]) -> Tensor:
        return normalizer(rewards[torch.randperm(len(rewards), generator=generator)], keys)

    return normalize


class PromptStatistics:
    """
    Standardises with running statistics per prompt, section 5.2 of https://huggingface.co/papers/2305.13301.

    Every key, a prompt with what belongs to it, keeps its last `buffer_size` rewards, those of the current round
    included. One with fewer than `min_count` of them is standardised with the mean and standard deviation of the
    round instead.

    Args:
        buffer_size (`int`):
            How many rewards of a key are remembered.
        min_count (`int`):
            From how many on they are used.
    """

    def __init__(self, buffer_size: int, min_count: int):
        self.min_count = min_count
        self.rewards: defaultdict[Hashable, deque[float]] = defaultdict(lambda: deque(maxlen=buffer_size))

    def __call__(self, rewards: Tensor, keys: Sequence[Hashable]) -> Tensor:
        advantages = torch.zeros_like(rewards, dtype=torch.float64)
        for key, indices in indices_by_key(keys).items():
            self.rewards[key].extend(rewards[indices].tolist())
            advantages[indices] = standardize(rewards[indices], self._population(key, rewards))
        return advantages

    def populations(self, rewards: Tensor, keys: Sequence[Hashable]) -> list[Tensor]:
        """What the rewards of each key of the round, once remembered, are standardised with."""
        return [self._population(key, rewards) for key in indices_by_key(keys)]

    def _population(self, key: Hashable, rewards: Tensor) -> Tensor:
        remembered = self.rewards.get(key, ())
        return torch.tensor(remembered, dtype=torch.float64) if len(remembered) >= self.min_count else rewards

    def state_dict(self) -> dict[Any, list[float]]:
        """The remembered rewards by key, JSON-serialisable where the keys are strings, for a checkpoint."""
        return {key: list(rewards) for key, rewards in self.rewards.items()}

    def load_state_dict(self, state: dict[Any, list[float]]) -> None:
        """Replaces the remembered rewards by those of [`state_dict`]."""
        self.rewards.clear()
        for key, rewards in state.items():
            self.rewards[key].extend(rewards)


def indices_by_key(keys: Sequence[Hashable]) -> dict[Any, list[int]]:
    """Positions of each distinct key, in the order of first appearance."""
    positions: dict[Any, list[int]] = {}
    for index, key in enumerate(keys):
        positions.setdefault(key, []).append(index)
    return positions

"""Rewards to advantages: A = (r − mean) / (std + δ), over the round, a prompt's history or a group.

The arithmetic is float64 and runs on every process over the gathered rewards of all of them.
"""

import itertools
import math
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from ddpo_trl.config import DDPOConfig
from ddpo_trl.prompts import PromptKeyFunction, PromptPair, prompt_keys
from ddpo_trl.rewards.scoring import RewardScorer


# Keeps the quotient finite when nearly all rewards are equal; far below any reward difference that matters.
DELTA = 1e-6

# Rewards whose range is below this share of their magnitude are equal: far above the rounding of float64 sums (1e-16),
# and below that of float32 (6e-8), so that rewards which differ in float32 stay different.
EQUAL = 1e-8

# (N,) rewards and N keys, which define the samples that are compared with each other, to (N,) advantages
Normalizer = Callable[[Tensor, Sequence[Hashable]], Tensor]


def all_equal(rewards: Tensor) -> bool:
    """Return whether all `(M,)` rewards are equal, except for rounding."""
    if not len(rewards):
        return True
    return bool(rewards.max() - rewards.min() <= EQUAL * rewards.abs().max())


def standardize(rewards: Tensor, population: Tensor | None = None) -> Tensor:
    """
    (r − mean) / (std + δ) with mean and (biased) standard deviation of `population`, by default of `rewards`.

    Where the population carries no information ([`all_equal`]), advantages are exactly zero.

    Args:
        rewards (`torch.Tensor` of shape `(N,)`):
            The rewards to standardize.
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
    """Standardize over all samples of the round; `keys` are not used."""
    return standardize(rewards)


def normalize_by_group(rewards: Tensor, keys: Sequence[Hashable]) -> Tensor:
    """
    Standardize over the samples of the round that share a key, by which each draw of a prompt is one group (GRPO,
    https://huggingface.co/papers/2402.03300).
    """
    advantages = torch.zeros_like(rewards, dtype=torch.float64)
    for indices in indices_by_key(keys).values():
        advantages[indices] = standardize(rewards[indices])
    return advantages


def groups(rewards: Tensor, keys: Sequence[Hashable]) -> list[Tensor]:
    """Return the rewards of each group of [`normalize_by_group`]."""
    return [rewards[indices] for indices in indices_by_key(keys).values()]


def fraction_without_spread(populations: Sequence[Tensor]) -> float:
    """Share of the populations whose advantages are all zero."""
    return sum(map(all_equal, populations)) / max(len(populations), 1)


def normalize_valid(normalizer: Normalizer, rewards: Tensor, keys: Sequence[Hashable]) -> Tensor:
    """Normalize the `(N,)` rewards that are valid (not NaN) as if there were no others; 0 for the others."""
    valid = ~rewards.isnan()
    advantages = torch.zeros_like(rewards, dtype=torch.float64)
    advantages[valid] = normalizer(rewards[valid], select(keys, valid))
    return advantages


def select(values: Sequence[Any], mask: Tensor) -> list[Any]:
    """Select the values for which a boolean mask of shape `(N,)` is true."""
    return list(itertools.compress(values, mask.tolist()))


def keep_raw(rewards: Tensor, keys: Sequence[Hashable]) -> Tensor:
    """A = r: no baseline, no scale."""
    return rewards.double()


def shuffled(normalizer: Normalizer, generator: torch.Generator) -> Normalizer:
    """Return a control that must not learn: `normalizer` gets the rewards of a round in random order."""

    def normalize(rewards: Tensor, keys: Sequence[Hashable]) -> Tensor:
        return normalizer(rewards[torch.randperm(len(rewards), generator=generator)], keys)

    return normalize


class PromptStatistics:
    """
    Standardize with running statistics per prompt, section 5.2 of https://huggingface.co/papers/2305.13301.

    Every key, a prompt with what belongs to it, keeps its last `buffer_size` rewards, those of the current round
    included. A key with fewer than `min_count` rewards is standardized with the mean and standard deviation of the
    round.

    Args:
        buffer_size (`int`):
            Number of rewards that are remembered per key.
        min_count (`int`):
            Number of rewards that a key needs before its own statistics are used.
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
        """Return the rewards that each key of the round is standardized with, once its own are remembered."""
        return [self._population(key, rewards) for key in indices_by_key(keys)]

    def _population(self, key: Hashable, rewards: Tensor) -> Tensor:
        remembered = self.rewards.get(key, ())
        return torch.tensor(remembered, dtype=torch.float64) if len(remembered) >= self.min_count else rewards

    def state_dict(self) -> dict[Any, list[float]]:
        """Return the remembered rewards by key, JSON-serializable if the keys are strings."""
        return {key: list(rewards) for key, rewards in self.rewards.items()}

    def load_state_dict(self, state: dict[Any, list[float]]) -> None:
        """Replace the remembered rewards by those of [`state_dict`]."""
        self.rewards.clear()
        for key, rewards in state.items():
            self.rewards[key].extend(rewards)


def indices_by_key(keys: Sequence[Hashable]) -> dict[Any, list[int]]:
    """Return the positions of each distinct key, in the order of first appearance."""
    positions: dict[Any, list[int]] = {}
    for index, key in enumerate(keys):
        positions.setdefault(key, []).append(index)
    return positions


class Advantages:
    """
    Advantages of a round, as `advantage_normalization`, `multi_objective_aggregation` and `advantage_clip` define
    them.

    Attributes:
        normalize (`Callable`):
            Summed rewards and keys to advantages.
        normalize_each (`list[Callable]`):
            The same for each reward function, before they are summed; empty if they are summed first.
    """

    def __init__(self, config: DDPOConfig, scorer: RewardScorer, prompt_key_fn: PromptKeyFunction):
        self.config = config
        self.scorer = scorer
        self.prompt_key_fn = prompt_key_fn
        self.normalize_each: list[Normalizer] = []
        if config.multi_objective_aggregation == "normalize_then_sum":
            self.normalize_each = [self._normalizer() for _ in scorer.names]
            self.normalize: Normalizer = normalize_by_batch
        else:
            self.normalize = self._normalizer()
        self._normalizers = self.normalize_each or [self.normalize]  # before the control replaces one

    def _normalizer(self) -> Normalizer:
        config = self.config
        match config.advantage_normalization:
            case "prompt":
                return PromptStatistics(
                    config.per_prompt_stat_tracking_buffer_size, config.per_prompt_stat_tracking_min_count
                )
            case "group":
                return normalize_by_group
            case "none":
                return keep_raw
            case _:
                return normalize_by_batch

    def _populations(self, normalizer: Normalizer, rewards: Tensor, keys: Sequence[Hashable]) -> list[Tensor]:
        if isinstance(normalizer, PromptStatistics):
            return normalizer.populations(rewards, keys)
        return groups(rewards, keys) if self.config.advantage_normalization == "group" else [rewards]

    def keys(self, pairs: Sequence[PromptPair]) -> Sequence[Hashable]:
        """Return the keys by which samples are compared: the task of their prompt, or the draw of it."""
        if self.config.advantage_normalization == "prompt":
            return prompt_keys(pairs, self.prompt_key_fn)
        return [index // self.config.num_images_per_prompt for index in range(len(pairs))]

    def __call__(self, rewards: Tensor, totals: Tensor, keys: Sequence[Hashable]) -> Tensor:
        """
        Compute the advantages of the samples of all processes: `(N,)`, float64; 0 for dropped samples.

        Args:
            rewards (`torch.Tensor` of shape `(N, F)`):
                A column per reward function, NaN where not valid.
            totals (`torch.Tensor` of shape `(N,)`):
                Their weighted sum; NaN for samples that are dropped.
            keys (`Sequence` of length `N`):
                See [`~Advantages.keys`].
        """
        if self.normalize_each:
            dropped = totals.isnan()  # a sample dropped for one function has no part in the statistics of the others
            columns = rewards.masked_fill(dropped[:, None], torch.nan).T
            each = [
                normalize_valid(own, column, keys) for own, column in zip(self.normalize_each, columns, strict=True)
            ]
            totals = self.scorer.total(torch.stack(each, dim=1)).masked_fill(dropped, torch.nan)
        advantages = normalize_valid(self.normalize, totals, keys)
        clip = math.inf if self.config.advantage_normalization == "none" else self.config.advantage_clip
        return advantages.clamp(-clip, clip)

    def fraction_without_spread(self, rewards: Tensor, totals: Tensor, keys: Sequence[Hashable]) -> float:
        """Share of the compared sets of valid rewards that give only zero advantages; shapes as for a call."""
        columns = rewards.T if self.normalize_each else [totals]
        shares = [
            fraction_without_spread(self._populations(normalizer, column[applies], select(keys, applies)))
            for normalizer, column in zip(self._normalizers, columns, strict=True)
            if (applies := ~column.isnan()).any()
        ]
        return sum(shares) / max(len(shares), 1)

    @property
    def statistics(self) -> list[PromptStatistics]:
        """Statistics per prompt, of the sum or of each reward function; empty unless rewards are remembered."""
        return [each for each in [self.normalize, *self.normalize_each] if isinstance(each, PromptStatistics)]

    def state_dict(self) -> list[dict[Any, list[float]]]:
        """Return the remembered rewards, for a checkpoint."""
        return [statistics.state_dict() for statistics in self.statistics]

    def load_state_dict(self, state: Sequence[dict[Any, list[float]]]) -> None:
        """Replace the remembered rewards by those of [`~Advantages.state_dict`]."""
        for statistics, own in zip(self.statistics, state, strict=True):
            statistics.load_state_dict(own)

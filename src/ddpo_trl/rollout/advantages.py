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
    """Standardizes over all samples of the round; `keys` play no part."""
    return standardize(rewards)


def normalize_by_group(rewards: Tensor, keys: Sequence[Hashable]) -> Tensor:
    """
    Standardizes over the samples of the round that share a key, by which each draw of a prompt is one group (GRPO,
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
    """Select the values for which a boolean mask of shape `(N,)` is true."""
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
    Standardizes with running statistics per prompt, section 5.2 of https://huggingface.co/papers/2305.13301.

    Every key, a prompt with what belongs to it, keeps its last `buffer_size` rewards, those of the current round
    included. One with fewer than `min_count` of them is standardized with the mean and standard deviation of the
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
        """Return the rewards that each key of the round is standardized with, once its own are remembered."""
        return [self._population(key, rewards) for key in indices_by_key(keys)]

    def _population(self, key: Hashable, rewards: Tensor) -> Tensor:
        remembered = self.rewards.get(key, ())
        return torch.tensor(remembered, dtype=torch.float64) if len(remembered) >= self.min_count else rewards

    def state_dict(self) -> dict[Any, list[float]]:
        """The remembered rewards by key, JSON-serializable where the keys are strings, for a checkpoint."""
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


class Advantages:
    """
    Rewards of a round to advantages, by `advantage_normalization`, `multi_objective_aggregation` and
    `advantage_clip`.

    Args:
        config ([`DDPOConfig`]):
            Settings.
        scorer ([`~ddpo_trl.rewards.scoring.RewardScorer`]):
            Reward functions and their weighted sum.
        prompt_key_fn (`Callable`):
            Name of the task of a prompt and its metadata, for `"prompt"`.

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
        self._populations = [self._populations_of(each) for each in self.normalize_each or [self.normalize]]

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

    def _populations_of(self, normalizer: Normalizer) -> Populations:
        if isinstance(normalizer, PromptStatistics):
            return normalizer.populations
        return groups if self.config.advantage_normalization == "group" else whole_round

    def keys(self, pairs: Sequence[PromptPair]) -> Sequence[Hashable]:
        """Keys by which the samples of a round are compared: the task of their prompt, or the draw of it."""
        if self.config.advantage_normalization == "prompt":
            return prompt_keys(pairs, self.prompt_key_fn)
        return [index // self.config.num_images_per_prompt for index in range(len(pairs))]

    def __call__(self, rewards: Tensor, totals: Tensor, keys: Sequence[Hashable]) -> Tensor:
        """
        Advantages of the samples of all processes.

        Args:
            rewards (`torch.Tensor` of shape `(N, F)`):
                A column per reward function, NaN where not valid.
            totals (`torch.Tensor` of shape `(N,)`):
                Their weighted sum; NaN for samples that are dropped.
            keys (`Sequence` of length `N`):
                See [`~Advantages.keys`].

        Returns:
            `torch.Tensor` of shape `(N,)`, float64; 0 for dropped samples.
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
        shares = [
            fraction_without_spread(populations(column[applies], select(keys, applies)))
            for populations, column in zip(
                self._populations, rewards.T if self.normalize_each else [totals], strict=True
            )
            if (applies := ~column.isnan()).any()
        ]
        return sum(shares) / max(len(shares), 1)

    @property
    def statistics(self) -> list[PromptStatistics]:
        """Statistics per prompt, of the sum or of each reward function; empty unless rewards are remembered."""
        return [each for each in [self.normalize, *self.normalize_each] if isinstance(each, PromptStatistics)]

    def state_dict(self) -> list[dict[Any, list[float]]]:
        """Remembered rewards, for a checkpoint."""
        return [statistics.state_dict() for statistics in self.statistics]

    def load_state_dict(self, state: Sequence[dict[Any, list[float]]]) -> None:
        """Replaces the remembered rewards by those of [`~Advantages.state_dict`]."""
        for statistics, own in zip(self.statistics, state, strict=True):
            statistics.load_state_dict(own)

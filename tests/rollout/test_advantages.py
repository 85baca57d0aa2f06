"""Advantages: values worked out by hand, and the running statistics against a slow loop."""

import itertools
import json
from collections import deque
from collections.abc import Callable

import numpy as np
import pytest
import torch

from ddpo_trl.rollout.advantages import (
    Normalizer,
    PromptStatistics,
    fraction_without_spread,
    groups,
    indices_by_key,
    keep_raw,
    normalize_by_batch,
    normalize_by_group,
    normalize_valid,
    shuffled,
    standardize,
)


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


NORMALIZERS: dict[str, Callable[[], Normalizer]] = {
    "batch": lambda: normalize_by_batch,
    "group": lambda: normalize_by_group,
    "prompt": lambda: PromptStatistics(buffer_size=4, min_count=1),
    "prompt before min_count": lambda: PromptStatistics(buffer_size=100, min_count=100),
}


def test_batch_advantages_are_in_units_of_the_standard_deviation():
    # mean 5, variance ((-3)^2 + (-1)^2 + 1^2 + 3^2) / 4 = 5
    advantages = normalize_by_batch(tensor(2, 4, 6, 8), ["a", "b", "a", "b"])
    torch.testing.assert_close(advantages, tensor(-3, -1, 1, 3) / 5**0.5, rtol=1e-6, atol=0)
    assert advantages.dtype == torch.float64


def test_group_advantages_compare_only_images_of_one_prompt():
    # a: 1, 3 (mean 2, std 1); b: 10, 10, 40 (mean 20, std sqrt(200)); c: alone
    advantages = normalize_by_group(tensor(1, 10, 3, 10, 7, 40), ["a", "b", "a", "b", "c", "b"])
    low, high = -10 / 200**0.5, 20 / 200**0.5
    torch.testing.assert_close(advantages, tensor(-1, low, 1, low, 0, high), rtol=2e-6, atol=0)


def test_raw_advantages_are_the_rewards():
    assert keep_raw(torch.tensor([2, -7]), ["a", "b"]).tolist() == [2.0, -7.0]


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_equal_rewards_give_exactly_zero(normalizer):
    for value, count in itertools.product([0.0, 0.1 * 3, 1 / 3, -1e9 / 7, 1e-30], [1, 2, 7, 64]):
        rewards = torch.full((count,), value, dtype=torch.float64)
        advantages = NORMALIZERS[normalizer]()(rewards, ["same"] * count)
        assert torch.equal(advantages, torch.zeros(count, dtype=torch.float64)), (value, count)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_integer_rewards_give_the_advantages_of_their_floats(normalizer):
    prompts = ["a", "b", "c", "a"]
    integers = NORMALIZERS[normalizer]()(torch.tensor([1, 2, 3, 4]), prompts)
    assert torch.equal(integers, NORMALIZERS[normalizer]()(tensor(1, 2, 3, 4), prompts))


def test_rewards_far_from_zero_keep_their_differences():
    # in float32 these four rewards would be equal
    torch.testing.assert_close(standardize(tensor(2, 4, 6, 8) + 1e8), tensor(-3, -1, 1, 3) / 5**0.5, rtol=1e-6, atol=0)


def test_a_prompt_seen_once_is_measured_against_the_round():
    # one reward of "a" is fewer than min_count = 2; mean of the round 4, std sqrt((9 + 1 + 4 + 0) / 4)
    advantages = PromptStatistics(buffer_size=8, min_count=2)(tensor(1, 5, 6, 4), ["a", "b", "b", "c"])
    of_round = (14 / 4) ** 0.5
    torch.testing.assert_close(advantages, tensor(-3 / of_round, -1, 1, 0), rtol=3e-6, atol=1e-12)


def test_a_prompts_history_moves_its_baseline():
    statistics = PromptStatistics(buffer_size=8, min_count=3)
    statistics(tensor(0, 10), ["a", "a"])  # two rewards: fewer than min_count
    advantages = statistics(tensor(5, 2), ["a", "b"])
    # of a: 0, 10, 5 (mean 5); b: the round 5, 2 (mean 3.5, std 1.5)
    torch.testing.assert_close(advantages, tensor(0, -1), rtol=1e-6, atol=1e-12)


def slow_prompt_statistics(rounds, buffer_size: int, min_count: int) -> list[list[float]]:
    """The same statistics as a plain loop over samples, with NumPy."""
    history: dict[str, deque] = {}
    advantages = []
    for rewards, prompts in rounds:
        for reward, prompt in zip(rewards, prompts, strict=True):
            history.setdefault(prompt, deque(maxlen=buffer_size)).append(reward)
        row = []
        for reward, prompt in zip(rewards, prompts, strict=True):
            population = history[prompt] if len(history[prompt]) >= min_count else rewards
            row.append((reward - np.mean(population)) / (np.std(population) + 1e-6))
        advantages.append(row)
    return advantages


def random_rounds(count: int = 12) -> list[tuple[list[float], list[str]]]:
    random = np.random.default_rng(0)
    # "e" is rare: it stays below min_count for a while; "a" overflows the buffer within a round
    return [
        (random.normal(3, 2, 16).tolist(), random.choice(list("abcde"), 16, p=[0.5, 0.2, 0.15, 0.1, 0.05]).tolist())
        for _ in range(count)
    ]


@pytest.mark.parametrize(("buffer_size", "min_count"), [(5, 5), (5, 1), (32, 16), (16, 16)])
def test_running_statistics_are_those_of_a_slow_loop(buffer_size, min_count):
    rounds = random_rounds()
    statistics = PromptStatistics(buffer_size, min_count)
    fast = [statistics(tensor(*rewards), prompts).tolist() for rewards, prompts in rounds]
    np.testing.assert_allclose(fast, slow_prompt_statistics(rounds, buffer_size, min_count), rtol=1e-9, atol=1e-12)


def test_running_statistics_survive_a_checkpoint():
    rounds = random_rounds()
    uninterrupted = PromptStatistics(buffer_size=5, min_count=3)
    for rewards, prompts in rounds[:6]:
        uninterrupted(tensor(*rewards), prompts)
    resumed = PromptStatistics(buffer_size=5, min_count=3)
    resumed(tensor(99.0, -99.0), ["a", "stale"])  # forgotten on loading
    resumed.load_state_dict(json.loads(json.dumps(uninterrupted.state_dict())))
    for rewards, prompts in rounds[6:]:
        expected = uninterrupted(tensor(*rewards), prompts)
        assert torch.equal(resumed(tensor(*rewards), prompts), expected)
    assert resumed.state_dict() == uninterrupted.state_dict()
    assert "stale" not in resumed.state_dict()


def test_a_buffer_forgets_the_oldest_rewards():
    statistics = PromptStatistics(buffer_size=3, min_count=1)
    statistics(tensor(1, 2), ["a", "a"])
    statistics(tensor(3, 4), ["a", "a"])
    assert statistics.state_dict() == {"a": [2.0, 3.0, 4.0]}


# ---- Rewards that are not valid ----

NAN = float("nan")


@pytest.mark.parametrize("normalizer", [*NORMALIZERS, "none"])
def test_a_dropped_reward_has_advantage_zero_and_the_others_are_as_if_it_had_not_been(normalizer):
    make = {**NORMALIZERS, "none": lambda: keep_raw}[normalizer]
    actual = normalize_valid(make(), tensor(1, NAN, 10, 3, NAN, 40, NAN), ["a", "a", "b", "a", "b", "b", "c"])
    expected = make()(tensor(1, 10, 3, 40), ["a", "b", "a", "b"])
    assert torch.equal(actual[[0, 2, 3, 5]], expected)
    assert torch.equal(actual[[1, 4, 6]], tensor(0, 0, 0))


def test_a_dropped_reward_moves_neither_mean_nor_standard_deviation():
    # of 2, 4, 6, 8: mean 5, variance 5
    advantages = normalize_valid(normalize_by_batch, tensor(2, NAN, 4, 6, NAN, 8), ["a"] * 6)
    torch.testing.assert_close(advantages, tensor(-3, 0, -1, 1, 0, 3) / 5**0.5, rtol=1e-6, atol=0)


def test_a_group_with_one_valid_reward_has_no_advantage():
    # a: 5, and one dropped; b: 1, 3 (mean 2, std 1); c: none valid
    advantages = normalize_valid(normalize_by_group, tensor(5, NAN, 1, 3, NAN, NAN), ["a", "a", "b", "b", "c", "c"])
    torch.testing.assert_close(advantages, tensor(0, 0, -1, 1, 0, 0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("normalizer", [*NORMALIZERS, "none"])
def test_no_valid_reward_at_all_gives_zero_advantages(normalizer):
    make = {**NORMALIZERS, "none": lambda: keep_raw}[normalizer]
    assert normalize_valid(make(), tensor(NAN, NAN), ["a", "b"]).tolist() == [0.0, 0.0]


def test_prompt_statistics_do_not_remember_dropped_rewards():
    statistics = PromptStatistics(buffer_size=3, min_count=1)
    normalize_valid(statistics, tensor(1, NAN, 2, NAN), ["a", "a", "a", "b"])
    normalize_valid(statistics, tensor(NAN, NAN, 3), ["a", "a", "a"])
    assert statistics.state_dict() == {"a": [1.0, 2.0, 3.0]}


# ---- Rewards without spread ----


@pytest.mark.parametrize(
    ("rewards", "prompts", "expected"),
    [
        ([1, 1, 2, 3], "aabb", 0.5),
        ([1, 1, 2, 3], "abab", 0.0),
        ([1, 2, 3, 4], "abcd", 1.0),  # a prompt seen once
        ([0.1 + 0.2, 0.3, 1, 2], "aabb", 0.5),  # equal but for rounding
        ([1e12 + 1e-3, 1e12, 1, 2], "aabb", 0.5),
        ([1.0, 1.0 + 2**-23, 5, 5], "aabb", 0.5),  # neighbours in float32 are different rewards
        ([0, 0, -1e-30, 1e-30], "aabb", 0.5),
    ],
)
def test_groups_without_spread_are_counted(rewards, prompts, expected):
    assert fraction_without_spread(groups(tensor(*rewards), list(prompts))) == expected


@pytest.mark.parametrize(("rewards", "expected"), [([2, 2, 2], 1.0), ([2, 2, 3], 0.0), ([7], 1.0), ([], 0.0)])
def test_a_round_has_spread_or_not(rewards, expected):
    populations = [tensor(*rewards)] if rewards else []
    assert fraction_without_spread(populations) == expected


def test_prompts_are_counted_by_the_rewards_that_they_are_standardised_with():
    statistics = PromptStatistics(buffer_size=8, min_count=2)
    statistics(tensor(5, 6), ["a", "b"])
    rewards, prompts = tensor(5, 7, 9), ["a", "b", "c"]
    statistics(rewards, prompts)
    # a: 5, 5; b: 6, 7; c, seen once: the round, 5, 7, 9
    assert [population.tolist() for population in statistics.populations(rewards, prompts)] == [
        [5, 5],
        [6, 7],
        [5, 7, 9],
    ]
    assert fraction_without_spread(statistics.populations(rewards, prompts)) == pytest.approx(1 / 3)
    assert statistics.state_dict() == {"a": [5.0, 5.0], "b": [6.0, 7.0], "c": [9.0]}  # looking changes nothing


def test_differences_of_rounding_are_no_advantages():
    assert standardize(tensor(1e12, 1e12 + 1e-3, 1e12 - 1e-3)).tolist() == [0.0, 0.0, 0.0]


def test_positions_are_listed_by_key():
    assert indices_by_key(["b", "a", "b", "c", "a"]) == {"b": [0, 2], "a": [1, 4], "c": [3]}


# ---- The control ----


def control(normalizer: Normalizer, seed: int = 0) -> Normalizer:
    return shuffled(normalizer, torch.Generator().manual_seed(seed))


def test_shuffled_advantages_are_the_same_numbers_in_another_order():
    rewards = torch.arange(100).double()
    normalize = control(normalize_by_batch)
    first, second = normalize(rewards, [""] * 100), normalize(rewards, [""] * 100)
    expected = normalize_by_batch(rewards, [""] * 100)  # ascending, as the rewards
    for advantages in (first, second):
        torch.testing.assert_close(advantages.sort().values, expected, rtol=1e-12, atol=1e-12)
    assert not torch.equal(first, second)
    assert torch.equal(first, control(normalize_by_batch)(rewards, [""] * 100))


def test_shuffled_advantages_say_nothing_about_their_samples():
    rewards = torch.randn(256, generator=torch.Generator().manual_seed(1)).double()
    normalize = control(normalize_by_batch)
    correlations = [
        (normalize(rewards, [""] * 256) * normalize_by_batch(rewards, [""] * 256)).mean() for _ in range(400)
    ]
    # of two independent standardised series of length n: mean -> 0, std 1 / sqrt(n - 1)
    assert abs(torch.stack(correlations).mean().item()) < 4 / 255**0.5 / 400**0.5


def test_shuffled_rewards_are_normalised_after_the_shuffle():
    # each group of two then holds any two of the rewards; of two different ones the advantages are 1 and -1
    advantages = control(normalize_by_group)(tensor(1, 1, 1, 1, 5, 9, 20, 40), list("aabbccdd"))
    pairs = advantages.reshape(4, 2)
    torch.testing.assert_close(pairs[:, 0], -pairs[:, 1], rtol=0, atol=1e-12)
    assert set(advantages.round(decimals=5).tolist()) <= {-1.0, 0.0, 1.0}

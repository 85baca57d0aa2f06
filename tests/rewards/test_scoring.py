"""Reward functions: whatever form their answer has, when they run, and how a wrong one is refused."""

import asyncio
import functools
import math
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch

from ddpo_trl.rewards.answers import as_rewards
from ddpo_trl.rewards.function import reward_name, unique_names
from ddpo_trl.rewards.pending import first_problem
from ddpo_trl.rewards.scoring import RewardScorer


IMAGES = torch.zeros(3, 3, 4, 4)
PROMPTS = ("cat", "dog", "owl")
METADATA = ({"legs": 4}, {"legs": 4}, {"legs": 2})


def rewards_of(*functions: Any, timeout: float | None = None) -> torch.Tensor:
    scorer = RewardScorer(list(functions), timeout=timeout)
    return scorer.submit(IMAGES, PROMPTS, METADATA, when="round 7").result()


def answering(answer: Any) -> Any:
    return lambda images, prompts, metadata: answer


class Counted:
    """A callable object, with what it was called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, images: Any, prompts: Any, metadata: Any) -> list[int]:
        self.calls.append((images, prompts, metadata))
        return [3, -1, 2]


class AsyncCounted(Counted):
    async def __call__(self, images: Any, prompts: Any, metadata: Any) -> list[int]:  # type: ignore[override]
        return super().__call__(images, prompts, metadata)


async def slow_answer(images: Any, prompts: Any, metadata: Any) -> tuple[list[int], dict[str, int]]:
    await asyncio.sleep(0.001)
    return [3, -1, 2], {"tokens": 5}


def with_keyword(images: Any, prompts: Any, metadata: Any, scale: int) -> list[int]:
    return [3 * scale, -1 * scale, 2 * scale]


# ---- Answers ----


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(answering([3, -1, 2]), id="list of int"),
        pytest.param(answering([3.0, -1.0, 2.0]), id="list of float"),
        pytest.param(answering((3, -1, 2)), id="tuple"),
        pytest.param(answering([np.float32(3), np.int64(-1), np.float64(2)]), id="list of NumPy scalars"),
        pytest.param(answering([torch.tensor(3), torch.tensor(-1.0), torch.tensor([2])]), id="list of tensors"),
        pytest.param(answering(np.array([3, -1, 2])), id="integer array"),
        pytest.param(answering(np.array([3, -1, 2], dtype=np.float16)), id="half array"),
        pytest.param(answering(torch.tensor([3, -1, 2])), id="integer tensor"),
        pytest.param(answering(torch.tensor([3, -1, 2]).bfloat16()), id="bfloat16 tensor"),
        pytest.param(answering(torch.tensor([[3.0], [-1.0], [2.0]])), id="column"),
        pytest.param(answering(torch.tensor([3.0, -1.0, 2.0], requires_grad=True)), id="tensor with gradient"),
        pytest.param(answering((torch.tensor([3, -1, 2]), {})), id="(tensor, info)"),
        pytest.param(answering(([3, -1, 2], None)), id="(list, None)"),
        pytest.param(answering((np.array([3, -1, 2]), {"info": [1, 2, 3]})), id="(array, info)"),
        pytest.param(slow_answer, id="async def"),
        pytest.param(Counted(), id="callable object"),
        pytest.param(AsyncCounted(), id="async callable object"),
        pytest.param(functools.partial(with_keyword, scale=1), id="partial"),
    ],
)
def test_every_form_of_answer_gives_the_same_rewards(function):
    rewards = rewards_of(function)
    assert torch.equal(rewards, torch.tensor([[3.0], [-1.0], [2.0]], dtype=torch.float64))
    assert rewards.dtype == torch.float64
    assert not rewards.requires_grad


@pytest.mark.parametrize("rewards", [[0.1, 0.7], np.array([0.1, 0.7]), torch.tensor([0.1, 0.7], dtype=torch.float64)])
def test_float64_rewards_keep_all_their_digits(rewards):
    assert as_rewards(rewards, PROMPTS[:2], "name").rewards.tolist() == [0.1, 0.7]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (torch.tensor(5), [5.0]),  # 0-dim: the mean of a batch of one
        (np.array(5), [5.0]),
        ((5,), [5.0]),
        ((torch.tensor(5), {}), [5.0]),
        ((5, 6), [5.0, 6.0]),  # two rewards, not (rewards, info)
        ((5.0, -6.0), [5.0, -6.0]),
        ((np.float32(5), np.float32(6)), [5.0, 6.0]),
        ((torch.tensor(5), torch.tensor(6)), [5.0, 6.0]),
        (([5, 6], [7, 8]), [5.0, 6.0]),  # info may look like rewards
    ],
)
def test_answers_for_one_or_two_images_are_not_mistaken(answer, expected):
    given = as_rewards(answer, PROMPTS[: len(expected)], "name")
    assert given.rewards.tolist() == expected
    assert given.problem is None and not given.not_applicable


def test_a_reward_function_gets_images_and_tuples_of_prompts_and_metadata():
    function = Counted()
    RewardScorer(function).submit(IMAGES, list(PROMPTS), list(METADATA), when="round 0").result()
    ((images, prompts, metadata),) = function.calls
    assert torch.equal(images, IMAGES)
    assert prompts == PROMPTS
    assert metadata == METADATA


# ---- Several functions ----


def test_every_function_has_a_column():
    rewards = rewards_of(answering([1, 2, 3]), answering(torch.tensor([10.0, 20.0, 30.0])))
    assert rewards.tolist() == [[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]]


@pytest.mark.parametrize(
    ("weights", "expected"), [(None, [11.0, 22.0]), ([1.0, 0.5], [6.0, 12.0]), ([-2, 0], [-2.0, -4.0])]
)
def test_the_total_is_the_weighted_sum(weights, expected):
    scorer = RewardScorer([answering(0), answering(0)], weights)
    assert scorer.total(torch.tensor([[1.0, 10.0], [2.0, 20.0]])).tolist() == expected


def test_functions_are_logged_by_their_names():
    scorer = RewardScorer(
        [slow_answer, functools.partial(functools.partial(with_keyword), scale=2), Counted(), Counted().__call__]
    )
    assert scorer.names == ["slow_answer", "with_keyword", "Counted", "__call__"]
    assert [reward_name(function) for function in (len, torch.nn.Linear(1, 1))] == ["len", "Linear"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a", "b"], ["a", "b"]),
        (["a", "a"], ["a", "a_2"]),
        (["a", "b", "a", "a"], ["a", "b", "a_2", "a_3"]),
    ],
)
def test_repeated_names_are_numbered(names, expected):
    assert unique_names(names) == expected


@pytest.mark.parametrize("names", [["a", "a", "a_2"], ["a_2", "a", "a"], ["a", "a", "a_2", "a_2"]])
def test_numbered_names_do_not_meet_names_that_look_numbered(names):
    assert len(set(unique_names(names))) == len(names)


# ---- Worker threads ----


def test_two_functions_score_at_the_same_time():
    barrier = threading.Barrier(2, timeout=10)

    def wait_for_the_other(images: Any, prompts: Any, metadata: Any) -> list[int]:
        barrier.wait()
        return [1, 2, 3]

    assert rewards_of(wait_for_the_other, wait_for_the_other).tolist() == [[1, 1], [2, 2], [3, 3]]


def test_scoring_runs_beside_the_caller():
    may_finish = threading.Event()
    threads: list[str] = []

    def wait_for_the_caller(images: Any, prompts: Any, metadata: Any) -> list[int]:
        threads.append(threading.current_thread().name)
        assert may_finish.wait(10)
        return [1, 2, 3]

    pending = RewardScorer(wait_for_the_caller).submit(IMAGES, PROMPTS, METADATA, when="round 0")
    assert not pending.done()
    may_finish.set()
    assert pending.result().tolist() == [[1.0], [2.0], [3.0]]
    assert pending.done()
    assert threads[0].startswith("reward")


def test_one_worker_scores_batch_after_batch_in_order():
    order: list[str] = []

    def note(images: Any, prompts: Any, metadata: Any) -> list[int]:
        order.append(prompts[0])
        return [len(order)]

    scorer = RewardScorer(note, max_workers=1)
    pending = [scorer.submit(IMAGES[:1], (prompt,), ({},), when="round 0") for prompt in "abcde"]
    assert [scores.result().item() for scores in pending] == [1, 2, 3, 4, 5]
    assert order == list("abcde")


def test_the_seconds_are_those_of_all_functions():
    clock = threading.Event()

    def take_a_moment(images: Any, prompts: Any, metadata: Any) -> list[int]:
        clock.wait(0.05)
        return [1, 2, 3]

    scorer = RewardScorer([take_a_moment, take_a_moment])
    assert 0.09 < scorer.submit(IMAGES, PROMPTS, METADATA, when="round 0").seconds() < 10


# ---- Refusals ----


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        ([1, 2], ValueError, "returned 2 values for 3 images; it must return one per image"),
        ((1, 2), ValueError, "returned 2 values for 3 images"),
        ((torch.tensor(1), torch.tensor(2)), ValueError, "returned 2 values for 3 images"),
        (torch.zeros(3, 2), ValueError, "returned 6 values for 3 images"),
        ((torch.zeros(4), {}), ValueError, "returned 4 values for 3 images"),
        (torch.tensor(1.0), ValueError, "returned 1 values for 3 images"),
        ([], ValueError, "returned 0 values for 3 images"),
        (1.0, TypeError, "returned 1.0; it must return one number per image"),
        (None, TypeError, "returned None; it must return one number per image"),
        ((None, {}), ValueError, "returned 2 values for 3 images"),
        ({"reward": [1, 2, 3]}, TypeError, "it must return one number per image"),
        ("123", TypeError, "returned '123'; it must return one number per image"),
        ([1, "good", 3], TypeError, "returned 'good' for image 1; it must be a number"),
        ([1, 2, None], TypeError, "returned None for image 2; it must be a number"),
        ([[1], 2, 3], TypeError, r"returned \[1\] for image 0; it must be a number"),
        ([1, 2, torch.zeros(2)], TypeError, "for image 2; it must be a number"),
        (np.array(["a", "b", "c"]), TypeError, "returned 'a' for image 0; it must be a number"),
        (torch.tensor([1.0, 2.0, 3.0j]), TypeError, "for image 0; it must be a number"),
        ([1, np.complex64(2 + 1j), 3], TypeError, "for image 1; it must be a number"),
        ([1, 2, b"3"], TypeError, "returned b'3' for image 2; it must be a number"),
        ([1.0, float("nan"), 3.0], ValueError, "returned nan for image 1; rewards must be finite"),
        (np.array([1.0, 2.0, -np.inf]), ValueError, "returned -inf for image 2; rewards must be finite"),
        (torch.tensor([1e39, 0.0, 0.0]), ValueError, "returned inf for image 0; rewards must be finite"),
    ],
)
def test_a_wrong_answer_is_refused_with_the_function_and_the_round(answer, error, message):
    def judge(images: Any, prompts: Any, metadata: Any) -> Any:
        return answer

    with pytest.raises(error, match=rf"Reward function `judge` \(round 7\) .*{message}"):
        rewards_of(judge)


async def fails_late(images: Any, prompts: Any, metadata: Any) -> list[int]:
    await asyncio.sleep(0)
    raise KeyError("legs")


def fails(images: Any, prompts: Any, metadata: Any) -> list[int]:
    raise KeyError("legs")


@pytest.mark.parametrize("function", [fails, fails_late])
def test_an_exception_is_named_with_the_function_the_round_and_the_prompts(function):
    with pytest.raises(RuntimeError) as caught:
        rewards_of(function)
    message = str(caught.value)
    for part in (f"`{function.__name__}`", "KeyError", "legs", "round 7", "['cat', 'dog', 'owl']"):
        assert part in message
    assert isinstance(caught.value.__cause__, KeyError)


async def is_cancelled(images: Any, prompts: Any, metadata: Any) -> list[int]:
    raise asyncio.CancelledError("legs")


def wants_to_exit(images: Any, prompts: Any, metadata: Any) -> list[int]:
    raise SystemExit("legs")


@pytest.mark.parametrize("function", [is_cancelled, wants_to_exit])
def test_what_is_no_ordinary_exception_is_one_as_a_reward(function):
    with pytest.raises(RuntimeError, match=f"`{function.__name__}` raised (CancelledError|SystemExit): legs"):
        rewards_of(function)


@pytest.mark.parametrize(
    ("answer", "about"),
    [
        ([1.0, float("nan"), None], "Its prompt is 'dog'."),
        ([1, 2], "The prompts are ['cat', 'dog', 'owl']."),
        (None, "The prompts are ['cat', 'dog', 'owl']."),
        ([1, "good", 3], "Its prompt is 'dog'."),
    ],
)
def test_a_refusal_names_the_prompt(answer, about):
    with pytest.raises((TypeError, ValueError)) as caught:
        rewards_of(answering(answer))
    assert str(caught.value).endswith(about)


# ---- Invalid rewards are marked ----

NAN = math.nan


def rewards_and_problem(function: Any) -> tuple[list[float], str]:
    pending = RewardScorer(function).submit(IMAGES, PROMPTS, METADATA, when="round 7")
    return pending.rewards_or_nan()[:, 0].tolist(), str(pending.problem())


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ([1.0, float("nan"), 3.0], [1.0, NAN, 3.0]),
        ([1.0, float("inf"), float("-inf")], [1.0, NAN, NAN]),
        ([1.0, 2.0, None], [1.0, 2.0, NAN]),
        ((None, 2.0, None), [NAN, 2.0, NAN]),
        (np.array([None, 2.0, 3.0], dtype=object), [NAN, 2.0, 3.0]),
        (torch.tensor([1e39, 0.0, -1.0]), [NAN, 0.0, -1.0]),
        ([10**400, 2, 3], [NAN, 2.0, 3.0]),
        (([1.0, None, 3.0], {"info": 1}), [1.0, NAN, 3.0]),
        ([None, None, None], [NAN, NAN, NAN]),
    ],
)
def test_an_invalid_value_marks_its_sample_and_no_other(answer, expected):
    rewards, problem = rewards_and_problem(answering(answer))
    assert rewards == pytest.approx(expected, nan_ok=True)
    first = next(index for index, value in enumerate(expected) if math.isnan(value))
    assert f"for image {first}; " in problem and f"Its prompt is {PROMPTS[first]!r}" in problem


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (fails, "raised KeyError"),
        (fails_late, "raised KeyError"),
        (wants_to_exit, "raised SystemExit"),
        (answering(None), "returned None; it must return one number per image"),
        (answering([1, 2]), "returned 2 values for 3 images"),
        (answering([1, 2, 3, 4]), "returned 4 values for 3 images"),
        (answering("123"), "returned '123'; it must return one number per image"),
        (answering([1, "good", 3]), "returned 'good' for image 1; it must be a number"),
        (answering([None, [2], 3]), "returned [2] for image 1; it must be a number"),
        (answering(torch.ones(3).to_sparse()), "raised RuntimeError"),
    ],
)
def test_a_call_without_a_usable_answer_marks_the_whole_batch(function, problem):
    rewards, message = rewards_and_problem(function)
    assert rewards == pytest.approx([NAN] * 3, nan_ok=True)
    assert problem in message


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ((None, 5.0), [NAN, 5.0]),
        ((5.0, None), [5.0, NAN]),  # a number comes first: two rewards
        ((None, None), [NAN, NAN]),
        (([5.0, None], None), [5.0, NAN]),  # (rewards, info)
    ],
)
def test_a_missing_reward_of_two_is_not_mistaken_for_all_of_them(answer, expected):
    assert as_rewards(answer, PROMPTS[:2], "name").rewards.tolist() == pytest.approx(expected, nan_ok=True)


def test_one_invalid_function_makes_the_total_invalid_whatever_its_weight():
    scorer = RewardScorer([answering([1, NAN, 3]), answering([10, 20, 30])], weights=[0.0, 1.0])
    rewards = scorer.submit(IMAGES, PROMPTS, METADATA, when="round 0").rewards_or_nan()
    assert scorer.total(rewards).tolist() == pytest.approx([10.0, NAN, 30.0], nan_ok=True)


def test_none_of_one_function_means_that_it_does_not_apply_and_the_others_count():
    """As in TRL's GRPO: the sum of image 1 has the second function's reward only. Nothing is wrong with it."""
    scorer = RewardScorer([answering([1, None, 3]), answering([10, 20, None])], weights=[2.0, 1.0])
    pending = scorer.submit(IMAGES, PROMPTS, METADATA, when="round 0")
    assert pending.rewards_or_nan().tolist() == [
        [1, 10],
        pytest.approx([NAN, 20], nan_ok=True),
        pytest.approx([3, NAN], nan_ok=True),
    ]
    assert scorer.total(pending.result()).tolist() == [12.0, 20.0, 6.0]
    assert pending.problem() is None


def test_a_sample_to_which_no_function_applies_is_invalid():
    scorer = RewardScorer([answering([1, None, 3]), answering([10, None, None])])
    pending = scorer.submit(IMAGES, PROMPTS, METADATA, when="round 0")
    assert scorer.total(pending.rewards_or_nan()).tolist() == pytest.approx([11.0, NAN, 3.0], nan_ok=True)
    with pytest.raises(TypeError, match=r"\(round 0\) returned None for image 1"):
        pending.result()


def test_valid_rewards_have_no_problem():
    pending = RewardScorer(answering([1, 2, 3])).submit(IMAGES, PROMPTS, METADATA, when="round 0")
    assert pending.problem() is None
    assert first_problem([pending], raises=True) is None


def test_the_first_problem_of_several_batches_is_raised_or_told():
    scorer = RewardScorer([answering([1, 2, 3]), answering([NAN, 2, 3]), fails])
    pending = [scorer.submit(IMAGES, PROMPTS, METADATA, when=f"round {index}") for index in range(2)]
    told = first_problem(pending, raises=False)
    assert told is not None and "(round 0) returned nan for image 0" in told
    with pytest.raises(ValueError, match=r"\(round 0\) returned nan for image 0"):
        first_problem(pending, raises=True)


# ---- Time limits ----


class Slow:
    """Hangs whenever the prompt is "dog", until the test is over."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self.started: list[float] = []

    def __call__(self, images: Any, prompts: Any, metadata: Any) -> list[int]:
        self.started.append(time.perf_counter())
        if prompts[0] == "dog":
            self.over.wait(60)
        return [1]


@pytest.fixture
def slow():
    function = Slow()
    yield function
    function.over.set()


def test_a_call_that_takes_too_long_is_named_with_the_limit_and_the_remedy(slow):
    scorer = RewardScorer(slow, timeout=0.2)
    start = time.perf_counter()
    with pytest.raises(TimeoutError) as caught:
        scorer.submit(IMAGES[:1], ("dog",), ({},), when="round 7").result()
    assert 0.2 <= time.perf_counter() - start < 10
    for part in ("`Slow` did not return within 0.2 s", "round 7", "['dog']", "increase reward_timeout"):
        assert part in str(caught.value)


def test_a_call_that_takes_too_long_does_not_block_the_ones_behind_it(slow):
    scorer = RewardScorer(slow, max_workers=1, timeout=0.2)
    pending = [scorer.submit(IMAGES[:1], (prompt,), ({},), when="round 0") for prompt in ("dog", "cat", "dog", "owl")]
    start = time.perf_counter()
    assert [scores.rewards_or_nan().item() for scores in pending] == pytest.approx([NAN, 1, NAN, 1], nan_ok=True)
    assert time.perf_counter() - start < 20
    assert not slow.over.is_set()  # the two calls still hang


def test_the_time_of_a_call_counts_from_when_it_starts_to_run(slow):
    """Of two calls of 0.3 s each on one worker the second waits 0.3 s, and is not too slow for a limit of 0.5 s."""

    def takes_its_time(images: Any, prompts: Any, metadata: Any) -> list[int]:
        time.sleep(0.3)
        return [1, 2, 3]

    scorer = RewardScorer(takes_its_time, max_workers=1, timeout=0.5)
    pending = [scorer.submit(IMAGES, PROMPTS, METADATA, when="round 0") for _ in range(2)]
    assert [scores.problem() for scores in pending] == [None, None]


def test_an_asynchronous_call_that_takes_too_long_is_cancelled():
    cancelled = threading.Event()

    async def hangs(images: Any, prompts: Any, metadata: Any) -> list[int]:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return [1, 2, 3]

    with pytest.raises(TimeoutError, match=r"`hangs` did not return within 0\.2 s \(round 7, prompts"):
        rewards_of(hangs, timeout=0.2)
    assert cancelled.wait(10)


async def times_out_itself(images: Any, prompts: Any, metadata: Any) -> list[int]:
    raise TimeoutError("the server's")


def test_a_functions_own_timeout_is_an_exception_like_others():
    with pytest.raises(RuntimeError, match="`times_out_itself` raised TimeoutError: the server's"):
        rewards_of(times_out_itself, timeout=10.0)


@pytest.mark.parametrize("function", [slow_answer, Counted()])
def test_a_call_within_the_limit_is_as_without_one(function):
    assert torch.equal(rewards_of(function, timeout=60.0), rewards_of(function))


def test_an_exception_of_one_batch_leaves_the_others_intact():
    def only_cats(images: Any, prompts: Any, metadata: Any) -> list[int]:
        assert prompts == ("cat",)
        return [1]

    scorer = RewardScorer(only_cats, max_workers=1)
    wrong, right = (scorer.submit(IMAGES[:1], (prompt,), ({},), when="round 0") for prompt in ("dog", "cat"))
    with pytest.raises(RuntimeError, match="AssertionError"):
        wrong.result()
    assert right.result().item() == 1


def test_a_function_with_another_signature_is_named():
    def two_arguments(images: Any, prompts: Any) -> list[int]:
        return [1, 2, 3]

    with pytest.raises(TypeError, match=r"reward_fn\[0\] \(`two_arguments`\).*called with three"):
        rewards_of(two_arguments)


def test_what_cannot_be_called_is_refused_with_its_index():
    with pytest.raises(TypeError, match=r"reward_fn\[1\] is 'jpeg', which can't be called"):
        RewardScorer([slow_answer, "jpeg"])  # type: ignore[list-item]


def test_an_empty_list_of_functions_is_refused():
    with pytest.raises(ValueError, match="reward_fn is an empty list; pass at least one reward function"):
        RewardScorer([])


@pytest.mark.parametrize("weights", [[1.0], [1.0, 2.0, 3.0], []])
def test_weights_of_another_number_are_refused(weights):
    with pytest.raises(ValueError, match=f"reward_weights has {len(weights)} values for 2 reward functions"):
        RewardScorer([slow_answer, fails], weights)

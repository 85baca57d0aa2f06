"""Prompts from a function, a dataset or a list."""

import datetime
import decimal
import functools
import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from ddpo_trl.descriptions import code_digest, described
from ddpo_trl.policy.values import by_value
from ddpo_trl.prompts import PromptSource, fingerprint, prompt_pairs, prompt_source
from ddpo_trl.prompts.sources import ShuffledPrompts


WORDS = ["cat", "dog", "owl", "fox", "bee"]


def drawn(source: PromptSource, rounds: int, count: int) -> list[str]:
    return [prompt for round in range(rounds) for prompt, _ in source.draw(round, count)]


# ---- What the user may give ----


def test_strings_have_empty_metadata():
    assert prompt_pairs(["cat", "dog"], "prompt_fn") == [("cat", {}), ("dog", {})]


def test_pairs_keep_their_metadata():
    pairs = [("cat", {"legs": 4}), ("owl", 2), ("fox", None)]
    assert prompt_pairs(pairs, "prompt_fn") == pairs


def test_the_other_columns_of_a_dataset_are_the_metadata():
    dataset = Dataset.from_dict({"legs": [4, 2], "prompt": ["cat", "owl"], "kind": ["mammal", "bird"]})
    expected = [("cat", {"legs": 4, "kind": "mammal"}), ("owl", {"legs": 2, "kind": "bird"})]
    assert list(prompt_pairs(dataset, "prompt_fn")) == expected


@pytest.mark.parametrize(
    "given",
    [WORDS, tuple(WORDS), [(word, {}) for word in WORDS], Dataset.from_dict({"prompt": WORDS})],
    ids=["list", "tuple", "pairs", "dataset"],
)
def test_all_collections_of_the_same_prompts_give_the_same_draws(given):
    assert prompt_source(given, seed=3).draw(2, 4) == prompt_source(WORDS, seed=3).draw(2, 4)


# ---- Lists and datasets ----


def test_each_pass_visits_every_prompt_once():
    # 5 rounds of 3 are 3 passes over 5 prompts, whose ends fall inside rounds
    prompts = drawn(prompt_source(WORDS, seed=0), rounds=5, count=3)
    for first in (0, 5, 10):
        assert sorted(prompts[first : first + 5]) == sorted(WORDS)


def test_a_round_may_be_longer_than_the_list():
    assert Counter(drawn(prompt_source(WORDS, seed=0), rounds=1, count=20)) == dict.fromkeys(WORDS, 4)


def test_passes_and_seeds_have_different_orders():
    words = [str(number) for number in range(50)]
    passes = [
        tuple(drawn(prompt_source(words, seed), rounds=3, count=50)[first : first + 50])
        for seed in (0, 1)
        for first in (0, 50, 100)
    ]
    assert len({*passes, tuple(words)}) == 7


def test_a_draw_depends_on_the_seed_and_the_round_only():
    in_order = prompt_source(WORDS, seed=7)
    rounds = [in_order.draw(round, 3) for round in range(6)]
    resumed = prompt_source(WORDS, seed=7)
    torch.manual_seed(99)
    for round in (4, 5, 0, 4):
        resumed.preview(2)
        assert resumed.draw(round, 3) == rounds[round]


def test_every_prompt_is_equally_likely_to_come_first():
    firsts = Counter(prompt_source(WORDS, seed).draw(0, 1)[0][0] for seed in range(1000))
    # binomial(1000, 1/5): 200 with a standard deviation of sqrt(160)
    assert all(abs(firsts[word] - 200) < 4 * 160**0.5 for word in WORDS)


def test_a_preview_of_a_list_is_the_first_round():
    source = ShuffledPrompts(prompt_pairs(WORDS, "prompts"), seed=0)
    assert source.preview(4) == source.draw(0, 4) == source.preview(4)


# ---- Functions ----


def numbered_prompts() -> PromptSource:
    counter = itertools.count()
    return prompt_source(lambda: (f"prompt {(number := next(counter))}", {"number": number}), seed=0)


def test_a_function_is_called_once_per_prompt():
    source = numbered_prompts()
    assert source.draw(0, 2) == [("prompt 0", {"number": 0}), ("prompt 1", {"number": 1})]
    assert drawn(source, rounds=1, count=3) == ["prompt 2", "prompt 3", "prompt 4"]


@pytest.mark.parametrize("count", [2, 5])
def test_a_preview_of_a_function_uses_nothing_up(count):
    source = numbered_prompts()
    assert [prompt for prompt, _ in source.preview(2)] == ["prompt 0", "prompt 1"]
    assert drawn(source, rounds=3, count=count) == [f"prompt {number}" for number in range(3 * count)]


def test_a_resumed_run_does_not_start_with_the_prompts_of_the_preview():
    source = numbered_prompts()
    source.preview(2)
    assert source.draw(5, 2) == [("prompt 2", {"number": 2}), ("prompt 3", {"number": 3})]


def test_a_callable_object_is_a_prompt_function():
    class Always:
        def __call__(self) -> tuple[str, None]:
            return "cat", None

    assert prompt_source(Always(), seed=0).draw(0, 2) == [("cat", None)] * 2


# ---- Refusals ----


@pytest.mark.parametrize("empty", [[], (), Dataset.from_dict({"prompt": []})], ids=["list", "tuple", "dataset"])
def test_no_prompts_are_refused(empty):
    with pytest.raises(ValueError, match="prompt_fn is empty; pass at least one prompt"):
        prompt_source(empty, seed=0)


def test_a_dataset_without_a_prompt_column_is_refused_with_its_columns():
    with pytest.raises(ValueError, match=r"eval_prompts is a dataset with the columns \['caption'\].*rename_column"):
        prompt_pairs(Dataset.from_dict({"caption": ["cat"]}), "eval_prompts")


@pytest.mark.parametrize(("given", "kind"), [("cat", "str"), (None, "NoneType"), ({"cat": 1}, "dict"), (3, "int")])
def test_what_is_no_collection_of_prompts_is_refused_with_its_type(given, kind):
    with pytest.raises(TypeError, match=f"prompt_fn is {kind}; give a callable .* or a list of strings"):
        prompt_source(given, seed=0)


@pytest.mark.parametrize("wrong", [3, None, ("cat",), (1, "cat"), ("cat", {}, {}), ["cat", {}]])
def test_a_wrong_prompt_is_refused_with_its_index(wrong):
    with pytest.raises(TypeError, match=r"prompt_fn\[1\] is .*each must be a str or a pair"):
        prompt_source(["cat", wrong], seed=0)


def test_a_wrong_prompt_in_a_dataset_is_refused_with_its_index():
    with pytest.raises(TypeError, match=r"prompt_fn\[0\]\['prompt'\] is 3"):
        prompt_source(Dataset.from_dict({"prompt": [3]}), seed=0)


@pytest.mark.parametrize("wrong", ["cat", None, ("cat",), (1, {}), ["cat", {}]])
def test_a_wrong_answer_of_a_prompt_function_is_refused(wrong):
    with pytest.raises(TypeError, match=r"prompt_fn returned .*must return a pair \(prompt, metadata\)"):
        prompt_source(lambda: wrong, seed=0).draw(0, 1)


# ---- Told apart ----


def test_metadata_are_those_of_their_draw_although_the_function_fills_one_dict_again():
    metadata: dict[str, int] = {"number": 0}

    def numbered() -> tuple[str, Any]:
        metadata["number"] += 1
        return "cat", metadata

    assert [entries["number"] for _, entries in prompt_source(numbered, seed=0).draw(0, 3)] == [1, 2, 3]


def test_metadata_that_differ_in_a_value_are_told_apart_and_equal_ones_are_not():
    """Also where JSON has no such value, and where the bytes of an array are addresses."""
    moment = datetime.date(2026, 1, 1)
    made = [
        lambda: moment,
        lambda: moment.replace(day=2),
        lambda: decimal.Decimal("0.1"),
        lambda: b"ab",
        lambda: b"cd",
        lambda: np.array(["a" * 30, moment], dtype=object),
        lambda: np.array(["b" * 30, moment], dtype=object),
    ]
    for known in (described, lambda value: fingerprint([("cat", {"value": value})])):
        values = [known(make()) for make in made]
        assert values == [known(make()) for make in made]
        assert len({str(value) for value in values}) == len(made)
    texts = [by_value(np.array([letter * 30], dtype=object)) for letter in "aab"]
    assert texts[0] == texts[1] != texts[2]
    assert described(object()) == "<builtins.object>"


def test_the_fingerprint_of_a_dataset_is_that_of_its_rows_in_order():
    rows = {"prompt": ["cat", "dog"], "x": [1, 2]}
    own = fingerprint(prompt_pairs(Dataset.from_dict(rows), "prompt_fn"))
    assert own == fingerprint(prompt_pairs(Dataset.from_dict(rows).with_format("torch"), "prompt_fn"))
    for other in ({**rows, "x": [1, 3]}, {**rows, "prompt": ["cat", "owl"]}):
        assert own != fingerprint(prompt_pairs(Dataset.from_dict(other), "prompt_fn"))
    assert own != fingerprint(prompt_pairs(Dataset.from_dict(rows).select([1, 0]), "prompt_fn"))


class Reward:
    def __init__(self, factor: float):
        self.factor = factor
        self.model = object()

    def __call__(self, *given: Any) -> float:
        return self.factor

    def other(self, *given: Any) -> float:
        return -self.factor


def enclosing(value: Any) -> Any:
    def function(*given: Any) -> Any:
        return value if given else function

    return function


def test_code_is_told_apart_by_what_it_computes_with():
    functions = [
        lambda: lambda *given: 1,
        lambda: lambda *given: 2,
        lambda: lambda *given: (lambda: 1)(),
        lambda: lambda *given: (lambda: 2)(),
        lambda: enclosing(1),
        lambda: enclosing([2.0, "b"]),
        lambda: enclosing(lambda: 3),
        lambda: functools.partial(enclosing(1), 2),
        lambda: functools.partial(enclosing(1), key=2),
        lambda: Reward(1.0),
        lambda: Reward(2.0),
        lambda: Reward(1.0).other,
        lambda: Reward(2.0).other,
        lambda: Reward(2.0).__call__,
        lambda: Reward,
        lambda: len,
        lambda: max,
    ]
    digests = [code_digest(make()) for make in functions]
    assert digests == [code_digest(make()) for make in functions]
    assert len(set(digests)) == len(functions)

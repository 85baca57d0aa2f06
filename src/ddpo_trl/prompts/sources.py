"""Where a trainer draws prompts from: a function, a dataset or a list. Each yields `(prompt, metadata)` pairs."""

import functools
import hashlib
import json
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

from ddpo_trl.descriptions import described, own_copy
from ddpo_trl.seeding import Stream, generator


PromptPair = tuple[str, Any]
PromptFunction = Callable[[], PromptPair]
PromptKeyFunction = Callable[[str, Any], str]


class PromptSource(ABC):
    """
    Draws the prompts of a round.

    Attributes:
        alike_on_all_processes (`bool`):
            Whether every process draws the same.
    """

    alike_on_all_processes: ClassVar[bool]

    @abstractmethod
    def draw(self, round: int, count: int) -> list[PromptPair]:
        """The `count` pairs of round `round`; rounds are drawn in order, from the one a run starts or resumes at."""

    @abstractmethod
    def preview(self, count: int) -> list[PromptPair]:
        """The first `count` pairs of a run that starts at round 0, without using them up."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Tells this source from others in a checkpoint, in words."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint, in addition to the global random states."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from where [`~PromptSource.state_dict`] was taken."""
        assert not state, "this source has none"


@runtime_checkable
class StatefulPromptFunction(Protocol):
    """A prompt function with a state of its own, such as a position in a stream. Checkpoints hold it."""

    def __call__(self) -> PromptPair: ...

    def state_dict(self) -> dict[str, Any]:
        """Numbers, strings and tensors in dicts and lists: what `torch.load(weights_only=True)` reads."""

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Goes on from a state."""


class FunctionPrompts(PromptSource):
    """
    Calls the user's function once per prompt. What it draws follows Python's, NumPy's and torch's global RNG, which a
    checkpoint holds.

    Args:
        prompt_fn (`Callable[[], tuple[str, Any]]`):
            Returns `(prompt, metadata)`. If it has `state_dict` and `load_state_dict`, a checkpoint holds its state.
    """

    alike_on_all_processes = False

    def __init__(self, prompt_fn: PromptFunction):
        self.prompt_fn = prompt_fn
        self.previewed: list[PromptPair] = []

    def draw(self, round: int, count: int) -> list[PromptPair]:
        pairs = self.previewed[:count] if round == 0 else []
        self.previewed = []
        return pairs + [self._call() for _ in range(count - len(pairs))]

    def preview(self, count: int) -> list[PromptPair]:
        self.previewed += [self._call() for _ in range(count - len(self.previewed))]
        return self.previewed[:count]

    @property
    def fingerprint(self) -> str:
        named = isinstance(self.prompt_fn, types.FunctionType | types.MethodType)
        return f"the function {self.prompt_fn.__qualname__ if named else type(self.prompt_fn).__qualname__}"

    def state_dict(self) -> dict[str, Any]:
        return self.prompt_fn.state_dict() if isinstance(self.prompt_fn, StatefulPromptFunction) else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if isinstance(self.prompt_fn, StatefulPromptFunction):
            self.prompt_fn.load_state_dict(state)

    def _call(self) -> PromptPair:
        try:
            pair = self.prompt_fn()
        except StopIteration as error:
            raise RuntimeError(
                "prompt_fn raised StopIteration: it has no more prompts. Begin again, with `itertools.cycle` for "
                "instance, or give a list."
            ) from error
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
            raise TypeError(f"prompt_fn returned {pair!r}; it must return a pair (prompt, metadata) with a str first.")
        return pair[0], own_copy(pair[1])  # the next call may fill the same dict again


class ShuffledPrompts(PromptSource):
    """
    Goes through a fixed list in a new random order on every pass. A round's prompts depend on the seed and the round
    only.

    Args:
        pairs (`Sequence[tuple[str, Any]]`):
            The `(prompt, metadata)` pairs.
        seed (`int`):
            Seed of the run.
    """

    alike_on_all_processes = True

    def __init__(self, pairs: Sequence[PromptPair], seed: int):
        self.pairs = pairs
        self.seed = seed

    def draw(self, round: int, count: int) -> list[PromptPair]:
        places = [divmod(position, len(self.pairs)) for position in range(round * count, (round + 1) * count)]
        orders = {which_pass: self._order(which_pass) for which_pass in {which_pass for which_pass, _ in places}}
        return [self.pairs[orders[which_pass][offset]] for which_pass, offset in places]

    def preview(self, count: int) -> list[PromptPair]:
        return self.draw(0, count)

    @functools.cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.pairs)

    def _order(self, which_pass: int) -> list[int]:
        random = generator(self.seed, Stream.PROMPTS, which_pass)
        return torch.randperm(len(self.pairs), generator=random).tolist()


class DatasetPairs(Sequence[PromptPair]):
    """
    A dataset's rows as `(prompt, metadata)` pairs, read when they are needed.

    Args:
        dataset (`datasets.Dataset`):
            With a `prompt` column.
    """

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        row = dict(self.dataset[index])
        return row.pop("prompt"), row


def fingerprint(pairs: Sequence[PromptPair]) -> str:
    """Number and hash of the prompts in their order, with their metadata. Images of a dataset are not decoded."""
    rows: Iterable[Any] = pairs
    if isinstance(pairs, DatasetPairs):
        rows = (row for table in pairs.dataset.with_format("arrow").iter(1000) for row in table.to_pylist())
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(described(row), sort_keys=True).encode())
    return f"{len(pairs)} prompts with the hash {digest.hexdigest()[:12]}"


def default_prompt_key(prompt: str, metadata: Any) -> str:
    """
    What tells one task from others: the prompt, with its metadata if it has any. Images and the like count by their
    content, see [`~ddpo_trl.descriptions.described`].
    """
    return json.dumps([prompt, described(metadata)], sort_keys=True) if metadata else prompt


def prompt_keys(pairs: Sequence[PromptPair], key_fn: PromptKeyFunction) -> list[str]:
    """
    The key of each pair.

    Raises:
        `TypeError`: If it is not a string.
    """
    keys = [key_fn(prompt, metadata) for prompt, metadata in pairs]
    for key, pair in zip(keys, pairs, strict=True):
        if not isinstance(key, str):
            raise TypeError(f"prompt_key_fn returned {key!r} for {pair!r}; it must return a str.")
    return keys


def prompt_pairs(prompts: Any, argument: str) -> Sequence[PromptPair]:
    """
    Turns a dataset or a list into `(prompt, metadata)` pairs.

    Args:
        prompts (`datasets.Dataset` or `Sequence`):
            A dataset with a `prompt` column (its other columns are the metadata), strings (their metadata is `{}`), or
            pairs.
        argument (`str`):
            Name of the argument, for the error messages.

    Raises:
        `TypeError`: If it is none of these, or one of the prompts is not a text.
        `ValueError`: If it is empty, or the dataset has no `prompt` column.
    """
    if isinstance(prompts, Dataset):
        pairs: Sequence[PromptPair] = _dataset_pairs(prompts, argument)
    elif isinstance(prompts, Sequence) and not isinstance(prompts, str):
        pairs = [(prompt, {}) if isinstance(prompt, str) else prompt for prompt in prompts]
        for index, pair in enumerate(pairs):
            if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
                raise TypeError(f"{argument}[{index}] is {pair!r}; each must be a str or a pair (str, metadata).")
    else:
        raise TypeError(f"{argument} is {type(prompts).__name__}; {_remedy(prompts)}")
    if not pairs:
        raise ValueError(f"{argument} is empty; give at least one prompt.")
    return pairs


def _remedy(prompts: Any) -> str:
    remedy = (
        "give a callable that returns (prompt, metadata), a datasets.Dataset with a 'prompt' column, or a list of "
        "strings."
    )
    if isinstance(prompts, str):
        return f"{remedy} For a file or a dataset of the Hub, `ddpo_trl.prompts.load_prompts({prompts!r})`."
    if isinstance(prompts, DatasetDict | IterableDatasetDict):
        return f"{remedy} Name one of its splits, {', '.join(prompts)}: `dataset[{next(iter(prompts), 'train')!r}]`."
    if isinstance(prompts, IterableDataset):
        return f"{remedy} A stream becomes a dataset by `Dataset.from_list(list(stream.take(1000)))`."
    return remedy


def _dataset_pairs(dataset: Dataset, argument: str) -> DatasetPairs:
    if "prompt" not in dataset.column_names:
        raise ValueError(
            f"{argument} is a dataset with the columns {dataset.column_names}; name the one with the texts "
            "'prompt' (`dataset.rename_column(...)`)."
        )
    if dataset.format["type"] in ("pandas", "polars", "arrow") or "prompt" not in dataset.format["columns"]:
        raise ValueError(
            f"{argument} is a dataset with the format {dataset.format['type']!r} and the columns "
            f"{dataset.format['columns']}, whose rows are not dicts with a prompt: `dataset.with_format(None)`."
        )
    for index, prompt in enumerate(dataset["prompt"]):
        if not isinstance(prompt, str):
            raise TypeError(f"{argument}[{index}]['prompt'] is {prompt!r}; the prompt column must hold texts.")
    return DatasetPairs(dataset)


def check_inputs(pairs: Sequence[PromptPair], names: Sequence[str], argument: str) -> None:
    """
    Refuses prompts that don't bring what the pipeline needs of each.

    Args:
        pairs (`Sequence[tuple[str, Any]]`):
            All prompts with their metadata.
        names (`Sequence[str]`):
            What `pipeline_inputs` names.
        argument (`str`):
            Name of the argument, for the error messages.

    Raises:
        `ValueError`: With the first prompt that lacks one, and its name.
    """
    if not names:
        return
    if isinstance(pairs, DatasetPairs):  # images are not read for this
        places: Iterable[tuple[str, Any]] = [(argument, dict.fromkeys(pairs.dataset.column_names))]
    else:
        places = ((f"{argument}[{index}]", metadata) for index, (_, metadata) in enumerate(pairs))
    for place, metadata in places:
        known = metadata if isinstance(metadata, Mapping) else {}
        if missing := [name for name in names if name not in known]:
            raise ValueError(
                f"pipeline_inputs names {missing[0]!r}, but {place} has "
                f"{', '.join(map(str, known)) or 'no metadata'}. Give it with each prompt, in the dict of its "
                "metadata or as a column of the dataset."
            )


def prompt_source(prompt_fn: Any, seed: int) -> PromptSource:
    """
    The source for what the user gave as `prompt_fn`.

    Args:
        prompt_fn (`Callable`, `datasets.Dataset` or `Sequence`):
            A function that returns `(prompt, metadata)`, or what [`prompt_pairs`] takes.
        seed (`int`):
            Seed of the order in which a dataset or list is gone through.

    Raises:
        `TypeError` or `ValueError`: As [`prompt_pairs`].
    """
    if callable(prompt_fn):
        return FunctionPrompts(prompt_fn)
    return ShuffledPrompts(prompt_pairs(prompt_fn, "prompt_fn"), seed)

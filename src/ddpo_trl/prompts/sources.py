"""Sources of `(prompt, metadata)` pairs: functions, datasets and lists."""

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
    Source of the prompts of each round.

    Attributes:
        alike_on_all_processes (`bool`):
            True if every process draws the same prompts.
    """

    alike_on_all_processes: ClassVar[bool]

    @abstractmethod
    def draw(self, round: int, count: int) -> list[PromptPair]:
        """Return the `count` pairs of a round. Rounds are drawn in order, from the first one or a resumed one."""

    @abstractmethod
    def preview(self, count: int) -> list[PromptPair]:
        """Return the first `count` pairs of round 0, which will still be drawn."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Description for checkpoints, different for different sources."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint, in addition to the global random states."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that [`~PromptSource.state_dict`] returned."""
        assert not state, "this source has none"


@runtime_checkable
class StatefulPromptFunction(Protocol):
    """Prompt function with a state, such as a position in a stream, that checkpoints contain."""

    def __call__(self) -> PromptPair: ...

    def state_dict(self) -> dict[str, Any]:
        """Return numbers, strings and tensors in dicts and lists, as `torch.load(weights_only=True)` requires."""

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Restore a state."""


class FunctionPrompts(PromptSource):
    """
    Source that calls a function once per prompt. Its draws from the global random states of Python, NumPy and torch
    continue after a resume, as does its own state if it has `state_dict` and `load_state_dict`.

    Args:
        prompt_fn (`Callable[[], tuple[str, Any]]`):
            Function that returns `(prompt, metadata)`.
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
                "prompt_fn raised StopIteration: it has no more prompts. Start again, with `itertools.cycle` for "
                "instance, or pass a list."
            ) from error
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
            raise TypeError(f"prompt_fn returned {pair!r}; it must return a pair (prompt, metadata) with a str first.")
        return pair[0], own_copy(pair[1])  # the next call may change the same dict


class ShuffledPrompts(PromptSource):
    """
    Source that goes through a list in a new random order in each pass. The prompts of a round depend only on the seed
    and the round.

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
    """Rows of a dataset with a `prompt` column as `(prompt, metadata)` pairs, read when they are needed."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        row = dict(self.dataset[index])
        return row.pop("prompt"), row


def fingerprint(pairs: Sequence[PromptPair]) -> str:
    """Return number and hash of prompts and metadata, in order. Images of a dataset are not decoded."""
    rows: Iterable[Any] = pairs
    if isinstance(pairs, DatasetPairs):
        rows = (row for table in pairs.dataset.with_format("arrow").iter(1000) for row in table.to_pylist())
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(described(row), sort_keys=True).encode())
    return f"{len(pairs)} prompts with the hash {digest.hexdigest()[:12]}"


def default_prompt_key(prompt: str, metadata: Any) -> str:
    """
    Return the prompt, with its metadata if it has any. Images and the like are compared by their content, see
    [`~ddpo_trl.descriptions.described`].
    """
    return json.dumps([prompt, described(metadata)], sort_keys=True) if metadata else prompt


def prompt_keys(pairs: Sequence[PromptPair], key_fn: PromptKeyFunction) -> list[str]:
    """
    Return the key of each pair.

    Raises:
        `TypeError`: If one is not a string.
    """
    keys = [key_fn(prompt, metadata) for prompt, metadata in pairs]
    for key, pair in zip(keys, pairs, strict=True):
        if not isinstance(key, str):
            raise TypeError(f"prompt_key_fn returned {key!r} for {pair!r}; it must return a str.")
    return keys


def prompt_pairs(prompts: Any, argument: str) -> Sequence[PromptPair]:
    """
    Return the `(prompt, metadata)` pairs of a dataset or list.

    Args:
        prompts (`datasets.Dataset` or `Sequence`):
            A dataset with a `prompt` column (its other columns are the metadata), strings (their metadata is `{}`), or
            pairs.
        argument (`str`):
            Name of the argument, for error messages.

    Raises:
        `TypeError`: If it is none of these, or a prompt is not a text.
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
        raise ValueError(f"{argument} is empty; pass at least one prompt.")
    return pairs


def _remedy(prompts: Any) -> str:
    remedy = (
        "give a callable that returns (prompt, metadata), a datasets.Dataset with a 'prompt' column, or a list of "
        "strings."
    )
    if isinstance(prompts, str):
        return f"{remedy} For a file or a dataset on the Hub, `ddpo_trl.prompts.load_prompts({prompts!r})`."
    if isinstance(prompts, DatasetDict | IterableDatasetDict):
        return f"{remedy} Pass one of its splits, {', '.join(prompts)}: `dataset[{next(iter(prompts), 'train')!r}]`."
    if isinstance(prompts, IterableDataset):
        return f"{remedy} Convert a stream by `Dataset.from_list(list(stream.take(1000)))`."
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
    Check that the metadata of prompts contains the pipeline's inputs.

    Args:
        pairs (`Sequence[tuple[str, Any]]`):
            All prompts with their metadata.
        names (`Sequence[str]`):
            Names in `pipeline_inputs`.
        argument (`str`):
            Name of the argument, for error messages.

    Raises:
        `ValueError`: If one is missing.
    """
    if not names:
        return
    if isinstance(pairs, DatasetPairs):  # without reading its images
        places: Iterable[tuple[str, Any]] = [(argument, dict.fromkeys(pairs.dataset.column_names))]
    else:
        places = ((f"{argument}[{index}]", metadata) for index, (_, metadata) in enumerate(pairs))
    for place, metadata in places:
        known = metadata if isinstance(metadata, Mapping) else {}
        if missing := [name for name in names if name not in known]:
            raise ValueError(
                f"pipeline_inputs names {missing[0]!r}, but {place} has "
                f"{', '.join(map(str, known)) or 'no metadata'}. Give it with each prompt, in its metadata "
                "or as a column of the dataset."
            )


def prompt_source(prompt_fn: Any, seed: int) -> PromptSource:
    """
    Return the source of a trainer's prompts.

    Args:
        prompt_fn (`Callable`, `datasets.Dataset` or `Sequence`):
            Function that returns `(prompt, metadata)`, or an argument of [`prompt_pairs`].
        seed (`int`):
            Seed of the order of a dataset or list.

    Raises:
        `TypeError` or `ValueError`: See [`prompt_pairs`].
    """
    if callable(prompt_fn):
        return FunctionPrompts(prompt_fn)
    return ShuffledPrompts(prompt_pairs(prompt_fn, "prompt_fn"), seed)

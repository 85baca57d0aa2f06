"""Prompt embeddings, computed once per prompt: replay runs no text encoder, and the encoders may leave the GPU.

They are kept in CPU memory. On the GPU are those of one batch.
"""

import copy
import functools
import inspect
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import recursively_apply
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor, nn

from ddpo_trl.descriptions import digest


# What the embeddings that are kept may take. In bfloat16 a prompt has 0.1 MiB for Stable Diffusion, 4 for Wan.
MAX_CACHED_BYTES = 2 * 2**30

# Inputs of a text encoder whose outputs are kept: the negative prompt, which comes with every other prompt again.
MAX_CACHED_INPUTS = 4

# Arguments of `encode_prompt` that hold one value per sample where they are lists; other lists are settings.
PER_SAMPLE_PREFIXES = ("prompt", "negative_prompt")

SETTING_TYPES = (str, int, float, bool, type(None), torch.device, torch.dtype)


@dataclass(frozen=True)
class Kept:
    """
    A tensor in CPU memory.

    Args:
        tensor (`torch.Tensor`):
            There.
        device (`torch.device`):
            Where it belongs.
    """

    tensor: Tensor
    device: torch.device

    def equals(self, other: "Kept") -> bool:
        """Whether one can stand for the other."""
        own, its = self.tensor, other.tensor
        same_kind = (self.device, own.dtype, own.shape) == (other.device, its.dtype, its.shape)
        return same_kind and torch.equal(own, its)


class EmbeddingCache:
    """
    Embeddings by what they were made from, in CPU memory: the last used ones, up to [`MAX_CACHED_BYTES`].

    What one has in common with the one before it is kept once: the negative prompt's.

    Attributes:
        largest (`int`):
            Bytes of the largest so far, with what it has in common.
    """

    largest = 0

    def __init__(self) -> None:
        self._entries: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._bytes = 0
        self._newest: list[Kept] = []

    def __contains__(self, key: Hashable) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def is_full(self) -> bool:
        """Whether another embedding of the largest size would be too much."""
        return self._bytes + self.largest > MAX_CACHED_BYTES

    def touch(self, key: Hashable) -> None:
        """Makes an embedding the last used one."""
        self._entries.move_to_end(key)

    def get(self, key: Hashable) -> Any:
        """An embedding where it belongs."""
        embedding, _ = self._entries[key]
        return recursively_apply(
            lambda kept: kept.tensor.to(kept.device), embedding, test_type=lambda value: isinstance(value, Kept)
        )

    def put(self, key: Hashable, embedding: Any) -> None:
        """Keeps an embedding."""
        before, self._newest = self._newest, []

        def keep(tensor: Tensor) -> Kept:
            own = Kept(tensor.cpu(), tensor.device)
            self._newest.append(next((other for other in before if own.equals(other)), own))
            return self._newest[-1]

        kept = recursively_apply(keep, embedding)
        size = sum(one.tensor.nbytes for one in self._newest if not any(one is other for other in before))
        self._entries[key] = kept, size
        self._bytes += size
        self.largest = max(self.largest, sum(one.tensor.nbytes for one in self._newest))

    def shrink(self) -> None:
        """Forgets the longest unused ones until the rest takes no more than it may."""
        while self._bytes > MAX_CACHED_BYTES and self._entries:
            _, (_, size) = self._entries.popitem(last=False)
            self._bytes -= size


def text_encoders(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    """The pipeline's text encoders by component name."""
    return {
        name: component
        for name, component in pipeline.components.items()
        if isinstance(component, nn.Module) and "text_encoder" in name
    }


class OnlyInPlace(Exception):
    """Prompts can't be encoded ahead: the pipeline does it where it is, or their embeddings are not kept."""


class NotJoinable(Exception):
    """The embeddings of single prompts don't make up that of a batch in a way that is known."""


class PromptEncoder:
    """
    A pipeline's `encode_prompt` that encodes every prompt once and by itself.

    So replay runs no text encoder, and a sample's embedding does not depend on the batch it is in. Embeddings of
    different lengths are padded at the end with zeros, in the mask too, as pipelines do within a batch. Which values
    then are a mask that was left out for a single prompt (Qwen-Image) is learned from one batch of two prompts, and
    where in the embeddings the samples are from another. Prompts that come with an image each are encoded one by one
    where two of them, encoded together, are what each is alone. What can't be joined is encoded as whole batches.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            The pipeline; it is given text encoders that remember their last inputs, and must be a copy for that.
        offload (`bool`):
            Whether the text encoders stay on the CPU while they have nothing to encode.

    Attributes:
        returned (`list`):
            What it returned since the list was emptied, which is for the caller to do.
    """

    def __init__(self, pipeline: DiffusionPipeline, offload: bool):
        self.pipeline = pipeline
        self.returned: list[Any] = []
        self.encoders = text_encoders(pipeline)
        self.offload = offload
        self._ahead: torch.device | None = None  # where the pipeline is going to run,
        self._here = torch.device("cpu")  # and where it runs while it is not there yet
        self._stays = False
        self._cache = EmbeddingCache()
        self._present: dict[Hashable, Any] = {}  # those of the last batch: steps of the same samples come in a row
        self._layouts: dict[Hashable, Any] = {}  # where the samples are in embeddings, by the settings of the call
        self._ragged_example: Any = None  # what encode_prompt returns for prompts of different lengths
        pipeline.register_modules(**{name: remembering(encoder) for name, encoder in self.encoders.items()})
        self._encode_prompt = pipeline.encode_prompt
        self._signature = inspect.signature(pipeline.encode_prompt)
        if offload:
            self._move("cpu")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the pipeline calls in place of its `encode_prompt`."""
        embeddings = self._embeddings(*args, **kwargs)
        self.returned.append(embeddings)
        if self._ahead is None:
            return embeddings
        return recursively_apply(lambda tensor: tensor.to(self._here), embeddings)

    def _embeddings(self, *args: Any, **kwargs: Any) -> Any:
        bound = self._signature.bind(*args, **kwargs)
        if self._ahead is not None and "device" in self._signature.parameters:
            bound.arguments["device"] = self._ahead
        calls = split_by_sample(bound)
        if self._ahead not in (None, self._here) and (
            calls is None or not is_about_texts(bound) or "device" not in bound.arguments
        ):
            raise OnlyInPlace
        if calls is None or (len(calls) > 1 and not self._learn_layout(calls)):
            if not is_known_by_value(bound):
                return self._encode([(args, kwargs)])[0]
            # Of embeddings that can't be joined, or about an image for all: the batch is remembered as it is.
            calls = [bound]
        keys = [call_key(call) for call in calls]
        missing = {key: call for key, call in zip(keys, calls, strict=True) if key not in self._cache}
        encoded = self._encode([(call.args, call.kwargs) for call in missing.values()])
        for key, embedding in zip(missing, encoded, strict=True):
            self._cache.put(key, embedding)
        self._present = {key: self._present[key] if key in self._present else self._cache.get(key) for key in keys}
        for key in keys:
            self._cache.touch(key)
        self._cache.shrink()
        embeddings = [self._present[key] for key in keys]
        if len(embeddings) == 1:
            return recursively_apply(torch.clone, embeddings[0])  # the pipeline may write into it
        if self._ragged_example is None and (lengths := [text_length(one) for one in embeddings]):
            shortest, longest = lengths.index(min(lengths)), lengths.index(max(lengths))
            if lengths[shortest] < lengths[longest]:
                example = self._encode_together(calls[shortest], calls[longest])
                check_mask(example, lengths[longest])
                self._ragged_example = recursively_apply(lambda tensor: tensor.new_empty(0), example)
        return join(embeddings, self._ragged_example, self._layouts[settings_key(calls[0])])

    def _learn_layout(self, calls: Sequence[inspect.BoundArguments]) -> bool:
        """Whether single prompts can be joined: it is learned from one call with the first prompt twice."""
        key = settings_key(calls[0])
        if key not in self._layouts:
            # Of images it shows only where two are different whether a sample's embedding depends on the other's.
            other = next((call for call in calls if images_key(call) != images_key(calls[0])), None)
            if other is None and not is_about_texts(calls[0]):
                return False
            single = self._encode_single(calls[0])
            pair = self._encode_together(calls[0], calls[0])
            try:
                layout = batch_dimensions(single, pair)
                if other is not None:
                    together = self._encode_together(calls[0], other)
                    check_close(join([single, self._encode_single(other)], together, layout), together)
            except (NotJoinable, ValueError):
                layout = NotJoinable
            self._layouts[key] = layout
        return self._layouts[key] is not NotJoinable

    def _encode_single(self, call: inspect.BoundArguments) -> Any:
        (single,) = self._encode([(call.args, call.kwargs)])
        self._cache.put(call_key(call), single)
        return single

    def _encode_together(self, *calls: inspect.BoundArguments) -> Any:
        together = copy.copy(calls[0])
        per_sample = per_sample_arguments(calls[0])
        together.arguments = {
            name: [call.arguments[name][0] for call in calls] if name in per_sample else value
            for name, value in together.arguments.items()
        }
        return self._encode([(together.args, together.kwargs)])[0]

    def _encode(self, calls: Sequence[tuple[Sequence[Any], dict[str, Any]]]) -> list[Any]:
        if not calls:
            return []
        with torch.no_grad(), self._at_hand():
            return [self._encode_prompt(*args, **kwargs) for args, kwargs in calls]

    @property
    def largest(self) -> int:
        """Bytes of the largest embedding of a prompt so far."""
        return self._cache.largest

    @contextmanager
    def _at_hand(self) -> Iterator[None]:
        """The text encoders are where the pipeline runs."""
        if not self.offload or self._stays:
            yield
            return
        self._move(self._ahead or self.pipeline.device)
        self._stays = self._ahead is not None
        try:
            yield
        finally:
            if not self._stays:
                self._move("cpu")

    @contextmanager
    def ahead(self, device: torch.device) -> Iterator[None]:
        """
        While the context is open, prompts are encoded for a pipeline that is going to run on `device`, wherever it is
        by now, and text encoders that are needed come once.

        Args:
            device (`torch.device`):
                As tensors there name it.
        """
        self._ahead, self._here = device, self.pipeline.device
        try:
            yield
        finally:
            self._ahead = None
            if self._stays:
                self._stays = False
                self._move("cpu")

    @property
    def is_full(self) -> bool:
        """Whether what is encoded next may push out what was encoded before."""
        return self._cache.is_full

    def _move(self, device: torch.device | str) -> None:
        for encoder in self.encoders.values():
            encoder.to(device)


def split_by_sample(call: inspect.BoundArguments) -> list[inspect.BoundArguments] | None:
    """One call per prompt; `None` if the call isn't about a list of prompts, or holds one image for all of them."""
    prompts = call.arguments.get("prompt")
    if not isinstance(prompts, list) or not is_known_by_value(call):
        return None
    per_sample = per_sample_arguments(call)
    if not all(name in per_sample or is_setting(value) for name, value in call.arguments.items()):
        return None
    calls = [copy.copy(call) for _ in prompts]
    for index, one in enumerate(calls):
        one.arguments = {
            name: [value[index]] if name in per_sample else value for name, value in call.arguments.items()
        }
    return calls


def per_sample_arguments(call: inspect.BoundArguments) -> set[str]:
    """
    Names of the arguments of a call with a list of prompts that hold one value per prompt.

    Texts are known by the argument's name. Images and the like may be several of every sample instead: what is made of
    each alone is compared with what is made of all.
    """
    count = len(call.arguments["prompt"])
    return {
        name
        for name, value in call.arguments.items()
        if isinstance(value, list)
        and (name.startswith(PER_SAMPLE_PREFIXES) or (len(value) == count and not is_setting(value)))
    }


def is_about_texts(call: inspect.BoundArguments) -> bool:
    """Whether a call holds texts and settings only."""
    return all(is_setting(value) for value in call.arguments.values())


def is_setting(value: Any) -> bool:
    """Whether a value is a text or number, or made of such: it can be told from another by comparison."""
    match value:
        case list() | tuple():
            return all(is_setting(part) for part in value)
        case dict():
            return all(is_setting(part) for part in value.values())
        case _:
            return isinstance(value, SETTING_TYPES)


def is_known_by_value(call: inspect.BoundArguments) -> bool:
    """Whether a call can be told from another by comparison, and encodes anything."""
    return not any(
        "embeds" in name and value is not None or by_value(value) is None for name, value in call.arguments.items()
    )


def by_value(value: Any) -> Hashable | None:
    """A setting, an image, an array or a tensor as what distinguishes it from others; `None` if nothing does."""
    match value:
        case Tensor():
            return ("tensor", value.dtype, value.shape, digest(value))
        case np.ndarray() if value.dtype == object:
            return by_value(value.tolist())
        case np.ndarray():
            return ("array", value.dtype.str, value.shape, digest(value))
        case Image.Image():
            return ("image", value.mode, value.size, digest(value))
        case list() | tuple():
            parts = tuple(by_value(part) for part in value)
            return None if None in parts else (type(value).__name__, parts)
        case _:
            return repr(value) if is_setting(value) else None


def call_key(call: inspect.BoundArguments) -> Hashable:
    """What distinguishes one call from another."""
    return tuple((name, by_value(value)) for name, value in call.arguments.items())


def images_key(call: inspect.BoundArguments) -> Hashable:
    """What distinguishes one call from another, apart from texts and settings."""
    return tuple(by_value(value) for value in call.arguments.values() if not is_setting(value))


def settings_key(call: inspect.BoundArguments) -> Hashable:
    """What distinguishes one call from another, apart from the samples."""
    per_sample = per_sample_arguments(call)
    return repr({name: "" if name in per_sample else value for name, value in call.arguments.items()})


def batch_dimensions(single: Any, pair: Any) -> Any:
    """
    For each tensor of a single prompt's embedding the dimension in which it is a batch; -1 if it belongs to no sample.

    Args:
        single:
            What `encode_prompt` returned for a prompt.
        pair:
            What it returned for the same prompt twice.

    Raises:
        [`NotJoinable`]: If one is no batch of one in exactly one dimension.
    """
    match single, pair:
        case (tuple(), tuple()) if len(single) == len(pair):
            return tuple(batch_dimensions(*parts) for parts in zip(single, pair, strict=True))
        case (dict(), dict()) if single.keys() == pair.keys():
            return {name: batch_dimensions(single[name], pair[name]) for name in single}
        case (list(), list()) if len(pair) == 2 * len(single):
            return None
        case (Tensor(), Tensor()) if single.ndim == pair.ndim:
            grown = [dim for dim in range(single.ndim) if single.shape[dim] != pair.shape[dim]]
            if not grown:
                return -1
            if len(grown) == 1 and (single.shape[grown[0]], pair.shape[grown[0]]) == (1, 2):
                return grown[0]
        case _ if not isinstance(single, Tensor | list | tuple | dict):
            return None
    raise NotJoinable


def check_close(joined: Any, together: Any) -> None:
    """
    Compare embeddings up to rounding.

    Args:
        joined:
            Those of single prompts, joined.
        together:
            What `encode_prompt` returned for all at once.

    Raises:
        [`NotJoinable`]: If they differ.
    """
    match joined, together:
        case (tuple() | list(), tuple() | list()) if len(joined) == len(together):
            for parts in zip(joined, together, strict=True):
                check_close(*parts)
        case (dict(), dict()) if joined.keys() == together.keys():
            check_close(list(joined.values()), [together[name] for name in joined])
        case (Tensor(), Tensor()) if joined.shape == together.shape:
            digits = torch.finfo(together.dtype).eps ** 0.5 if together.is_floating_point() else 0.0
            if (joined.float() - together.float()).norm() > digits * together.float().norm():
                raise NotJoinable
        case _ if isinstance(together, Tensor | tuple | list | dict) or joined != together:
            raise NotJoinable


def text_length(embeddings: Any) -> int:
    """Tokens of a single prompt's embedding."""
    first = embeddings[0] if isinstance(embeddings, tuple) else embeddings
    return first.shape[1] if isinstance(first, Tensor) and first.ndim > 1 else 0


def join(values: Sequence[Any], ragged_example: Any = None, layout: Any = 0) -> Any:
    """
    The embeddings of single prompts as those of a batch.

    Tensors of one sample are stacked up, padded with zeros at the end of the dimension behind that of the samples;
    lists are joined. What is equal for all prompts belongs to none of them (FLUX's text ids).

    Args:
        values (`Sequence`):
            What `encode_prompt` returned for each prompt.
        ragged_example (*optional*):
            What it returned for two prompts of different length at once. Where that has a mask and the single prompts
            have none, theirs are all ones.
        layout (*optional*):
            [`batch_dimensions`]; samples are in the first dimension by default.

    Raises:
        `ValueError`: If a value differs between prompts and has not one row per prompt.
    """
    first = values[0]
    match first:
        case tuple():
            columns = list(zip(*with_masks(values, ragged_example), strict=True))
            layouts = layout if isinstance(layout, tuple) else [0] * len(columns)
            return tuple(join(column, layout=own) for column, own in zip(columns, layouts, strict=True))
        case list():
            return [part for value in values for part in value]
        case dict():
            own_layout = layout if isinstance(layout, dict) else dict.fromkeys(first, 0)
            return {name: join([value[name] for value in values], layout=own_layout[name]) for name in first}
        case Tensor() if layout != -1 and first.ndim and all(value.shape[layout or 0] == 1 for value in values):
            return torch.cat(padded(values, layout or 0), dim=layout or 0)
        case Tensor() if all(torch.equal(value, first) for value in values):
            return first
        case _ if not isinstance(first, Tensor) and all(value == first for value in values):
            return first
    raise ValueError(
        f"encode_prompt returned {type(first).__name__} for single prompts that can't be joined to a batch: they "
        "differ and have not one row each."
    )


def with_masks(embeddings: Sequence[tuple[Any, ...]], ragged_example: Any) -> Sequence[tuple[Any, ...]]:
    """The embeddings of single prompts with masks of ones where the example of different lengths has masks."""
    lengths = [text_length(embedding) for embedding in embeddings]
    if ragged_example is None or len(set(lengths)) == 1:
        return embeddings
    return [
        tuple(
            torch.ones(1, length, dtype=example.dtype, device=example.device)
            if value is None and isinstance(example, Tensor)
            else value
            for value, example in zip(embedding, ragged_example, strict=True)
        )
        for embedding, length in zip(embeddings, lengths, strict=True)
    ]


def check_mask(embeddings: Any, length: int) -> None:
    """
    Raises a `ValueError` if nothing tells padding from text: a sample would depend on the longest prompt beside it.

    Args:
        embeddings:
            What `encode_prompt` returned for prompts of different length.
        length (`int`):
            Of the longest.
    """
    values = embeddings if isinstance(embeddings, tuple) else (embeddings,)
    if not any(isinstance(value, Tensor) and value.ndim == 2 and value.shape[1] == length for value in values):
        raise ValueError(
            "The pipeline's prompt embeddings have different lengths and no mask, so a sample would depend on the "
            "longest prompt beside it. Set per_device_sample_batch_size and per_device_train_batch_size to 1."
        )


def padded(rows: Sequence[Tensor], dim: int = 0) -> list[Tensor]:
    """
    Single samples with zeros at the end of the tokens up to the longest.

    Args:
        rows (`Sequence[torch.Tensor]` of shape `(1, L, ...)`):
            Of one sample each.
        dim (`int`):
            That of the samples, the tokens' being the next: 1 for `(layers, 1, L, ...)`.
    """
    if rows[0].ndim < dim + 2:
        return list(rows)
    longest = max(row.shape[dim + 1] for row in rows)
    if all(row.shape[dim + 1] == longest for row in rows):
        return list(rows)
    return [
        torch.cat(
            [row, row.new_zeros(*row.shape[: dim + 1], longest - row.shape[dim + 1], *row.shape[dim + 2 :])],
            dim=dim + 1,
        )
        for row in rows
    ]


def remembering(encoder: nn.Module) -> nn.Module:
    """
    A shallow copy of a text encoder, sharing its weights, that runs the same input only once.

    Prompts are encoded one by one, and each comes with the same negative prompt.
    """
    forward = encoder.forward
    cache: OrderedDict[Hashable, Any] = OrderedDict()

    @functools.wraps(forward)
    def remember(*args: Any, **kwargs: Any) -> Any:
        key = tuple(input_key(value) for value in (*args, *sorted(kwargs.items())))
        if key not in cache:
            cache[key] = forward(*args, **kwargs)
        cache.move_to_end(key)
        if len(cache) > MAX_CACHED_INPUTS:
            cache.popitem(last=False)
        return cache[key]

    twin = copy.copy(encoder)
    twin.__dict__["forward"] = remember
    return twin


def input_key(value: Any) -> Hashable:
    """A text encoder's argument by value."""
    match value:
        case Tensor():
            return by_value(value)
        case tuple():
            return tuple(input_key(part) for part in value)
        case _:
            return repr(value)

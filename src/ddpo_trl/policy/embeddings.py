"""Prompt embeddings, computed once per prompt: replay runs no text encoder, and the encoders may leave the GPU.

They are kept in CPU memory; only those of one batch are on the GPU.
"""

import copy
import inspect
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import recursively_apply
from diffusers import DiffusionPipeline
from torch import nn

from ddpo_trl.policy.embedding_batches import NotJoinable, batch_dimensions, check_close, check_mask, join, text_length
from ddpo_trl.policy.embedding_cache import EmbeddingCache
from ddpo_trl.policy.embedding_calls import (
    call_key,
    images_key,
    is_about_texts,
    is_known_by_value,
    per_sample_arguments,
    settings_key,
    split_by_sample,
)


def text_encoders(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    """Return the pipeline's text encoders by component name."""
    return {
        name: component
        for name, component in pipeline.components.items()
        if isinstance(component, nn.Module) and "text_encoder" in name
    }


class OnlyInPlace(Exception):
    """Prompts can't be encoded ahead: the pipeline does it where it is, or their embeddings are not kept."""


class PromptEncoder:
    """
    A pipeline's `encode_prompt` that encodes every prompt once and by itself.

    Replay then runs no text encoder, and a sample's embedding does not depend on the batch it is in. Embeddings of
    different lengths are padded at the end with zeros, and so are their masks, as pipelines do within a batch. One
    batch of two prompts shows which values are a mask that is left out for a single prompt (Qwen-Image); another one
    shows the dimension of the samples in each embedding. Prompts that come with an image each are encoded one by one
    if two of them encoded together equal each encoded alone. Embeddings that can't be joined are encoded as whole
    batches.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            The pipeline, whose own `encode_prompt` is called.
        offload (`bool`):
            Keep the text encoders on the CPU while they have nothing to encode.
    """

    def __init__(self, pipeline: DiffusionPipeline, offload: bool):
        self.pipeline = pipeline
        self.encoders = text_encoders(pipeline)
        self.offload = offload
        self._ahead: torch.device | None = None  # where the pipeline will run,
        self._here = torch.device("cpu")  # and where it runs while it is not there yet
        self._stays = False
        self._cache = EmbeddingCache()
        self._present: dict[Hashable, Any] = {}  # of the last batch: steps of the same samples come in a row
        self._layouts: dict[Hashable, Any] = {}  # where the samples are in embeddings, by the settings of the call
        self._ragged_example: Any = None  # what encode_prompt returns for prompts of different lengths
        self._encode_prompt = pipeline.encode_prompt
        self._signature = inspect.signature(pipeline.encode_prompt)
        if offload:
            self._move("cpu")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Encode prompts; the pipeline calls it instead of its own `encode_prompt`."""
        embeddings = self._embeddings(*args, **kwargs)
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
        """Learn from one call with the first prompt twice if single prompts can be joined, and return it."""
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
        with torch.no_grad(), self._encoders_on_device():
            return [self._encode_prompt(*args, **kwargs) for args, kwargs in calls]

    @property
    def largest(self) -> int:
        """Bytes of the largest prompt embedding so far."""
        return self._cache.largest

    @contextmanager
    def _encoders_on_device(self) -> Iterator[None]:
        """The text encoders are on the pipeline's device while the context is open."""
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
        Encode for a pipeline that will run on `device`, wherever it is now, while the context is open.

        Text encoders are moved to the device once.

        Args:
            device (`torch.device`):
                The device, as the `device` of its tensors.
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
        """`True` if the next embedding may push out an earlier one."""
        return self._cache.is_full

    def _move(self, device: torch.device | str) -> None:
        for encoder in self.encoders.values():
            encoder.to(device)

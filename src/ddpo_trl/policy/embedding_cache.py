"""A cache of prompt embeddings in CPU memory, bounded in bytes."""

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import recursively_apply
from torch import Tensor

from ddpo_trl.transfers import to_device


# Bound of the embeddings that are kept. In bfloat16 a prompt has 0.1 MiB for Stable Diffusion, 4 for Wan.
MAX_CACHED_BYTES = 2 * 2**30


@dataclass(frozen=True)
class Kept:
    """
    A tensor kept in CPU memory.

    Args:
        tensor (`torch.Tensor`):
            The tensor, on the CPU.
        device (`torch.device`):
            The device it came from.
    """

    tensor: Tensor
    device: torch.device

    def moved_back(self) -> Tensor:
        """Return the tensor on its device."""
        return to_device(self.tensor, self.device)

    def equals(self, other: "Kept") -> bool:
        """Return `True` if both hold the same tensor of the same device."""
        own, its = self.tensor, other.tensor
        same_kind = (self.device, own.dtype, own.shape) == (other.device, its.dtype, its.shape)
        return same_kind and torch.equal(own, its)


class EmbeddingCache:
    """
    The last used embeddings by what they were made from, in CPU memory, up to `MAX_CACHED_BYTES`.

    Tensors that an embedding shares with the one before it are kept once: the negative prompt's.

    Attributes:
        largest (`int`):
            Bytes of the largest embedding so far, including shared tensors.
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
        """`True` if another embedding of the largest size would exceed the bound."""
        return self._bytes + self.largest > MAX_CACHED_BYTES

    def touch(self, key: Hashable) -> None:
        """Mark an embedding as the last used one."""
        self._entries.move_to_end(key)

    def get(self, key: Hashable) -> Any:
        """Return an embedding on the device it came from."""
        embedding, _ = self._entries[key]
        return recursively_apply(Kept.moved_back, embedding, test_type=lambda value: isinstance(value, Kept))

    def put(self, key: Hashable, embedding: Any) -> None:
        """Add an embedding."""
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
        """Drop the least recently used embeddings until the rest is within the bound."""
        while self._bytes > MAX_CACHED_BYTES and self._entries:
            _, (_, size) = self._entries.popitem(last=False)
            self._bytes -= size

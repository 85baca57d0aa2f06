"""Networks on PyTorch's "meta" device, whose tensors have shapes and no memory, with a count of what would be live."""

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from accelerate.utils import recursively_apply
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


ALLOCATION = 512  # PyTorch's allocator for CUDA rounds sizes up to it


class NoForecast(ValueError):
    """The memory of a network can't be computed from shapes alone."""


class Call(NamedTuple):
    """
    Call of a network.

    Args:
        args (`tuple`), kwargs (`dict`):
            Its arguments, on "meta".
        peak (`int`):
            Most bytes that live at a time in it.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    peak: int


@contextmanager
def replaced(network: nn.Module, method: str, copied: Callable[..., Any]) -> Iterator[list[Call]]:
    """Let a network's method return zeros while the context is open, and collect its calls, as run by a copy."""
    calls: list[Call] = []

    def recorded(*args: Any, **kwargs: Any) -> Any:
        device = next(network.parameters()).device
        args, kwargs = recursively_apply(on_meta, (args, kwargs))
        with linear_attention(), LiveBytes() as live, torch.no_grad():
            result = copied(*args, **kwargs)
        calls.append(Call(args, kwargs, live.peak))
        return recursively_apply(lambda tensor: torch.zeros_like(tensor, device=device), result)

    before = vars(network).get(method)
    vars(network)[method] = recorded
    try:
        yield calls
    finally:
        del vars(network)[method]
        if before is not None:
            vars(network)[method] = before


def on_meta(tensor: Tensor) -> Tensor:
    """Return a tensor like another without memory."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def without_memory(network: Any) -> Any:
    """Return a copy of a network whose weights have no memory."""
    if "quantization_config" in network.config:
        raise NoForecast(f"{type(network).__name__} is quantized")
    memo: dict[int, Any] = {}
    for tensor in [each for module in network.modules() for each in tensors_in([*vars(module).values()])]:
        without = on_meta(tensor)  # also of tables that are neither parameters nor buffers
        memo[id(tensor)] = nn.Parameter(without, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else without
    return copy.deepcopy(network, memo)


def tensors_in(result: Any) -> Iterator[Tensor]:
    """Yield the tensors of a result."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, Mapping | list | tuple):
        for part in result.values() if isinstance(result, Mapping) else result:
            yield from tensors_in(part)


class LiveBytes(TorchDispatchMode):
    """Count the bytes of the tensors that are made while it is entered; `peak` is the most of them at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._current = 0
        self._live: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            for tensor in tensors_in(result):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), -(-storage.nbytes() // ALLOCATION) * ALLOCATION
        if key not in self._live:
            self._live[key] = weakref.ref(storage, lambda _: self._free(key, size))
            self._current += size
            self.peak = max(self.peak, self._current)

    def _free(self, key: int, size: int) -> None:
        del self._live[key]
        self._current -= size


@contextmanager
def linear_attention() -> Iterator[None]:
    """Let attention on "meta" keep no matrix of scores, as the kernels of GPUs do, while the context is open."""
    functions = vars(torch.nn.functional)
    plain = functions["scaled_dot_product_attention"]

    def attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not query.is_meta:
            return plain(query, key, value, *args, **kwargs)
        return LinearAttention.apply(query, key, value)

    functions["scaled_dot_product_attention"] = attend
    try:
        yield
    finally:
        functions["scaled_dot_product_attention"] = plain


class LinearAttention(torch.autograd.Function):
    """Shapes of attention that keeps its inputs, its output and a number per query for the backward pass."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(each) for each in ctx.saved_tensors[:3])


def backward_peak(network: Callable[..., Any], calls: Sequence[Call]) -> int:
    """Return the most bytes that live at a time in calls of a network and the backward pass through all of them."""
    with linear_attention(), LiveBytes() as live:
        outputs = [*tensors_in([network(*call.args, **call.kwargs) for call in calls])]
        torch.autograd.backward(outputs, outputs)
    return live.peak

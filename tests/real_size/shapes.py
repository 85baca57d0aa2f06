"""Results of operations on tensors without values: those of FakeTensorMode, remembered by shapes to be faster."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager


Make = Callable[[Sequence[Tensor]], Any]  # makes a result from the tensors among the arguments


class Shapes:
    """FakeTensorMode, with a memory of what the results of an operation look like."""

    def __init__(self) -> None:
        self.mode = FakeTensorMode()
        self._makers: dict[Hashable, Make] = {}

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Return the result of an operation whose tensors are all fakes."""
        tensors: list[Tensor] = []
        key = (func, described([*args, *kwargs.items()], tensors))
        if key in self._makers:
            return self._makers[key](tensors)
        result = self.mode.__torch_dispatch__(func, (), args, kwargs)
        if key != (func, described([*args, *kwargs.items()], [])):
            return result  # it changed the shape of an argument
        parts = result if isinstance(result, list | tuple) else [result]
        makers = [self._maker(each, tensors) for each in parts]
        if not isinstance(result, list | tuple):
            self._makers[key] = makers[0]
        elif (kind := type(result)) in (list, tuple):
            self._makers[key] = lambda tensors: kind([make(tensors) for make in makers])
        return result

    def _maker(self, result: Any, tensors: Sequence[Tensor]) -> Make:
        """Return a function that makes such a result: an argument, a view of one, a new tensor, or another value."""
        if not isinstance(result, FakeTensor):
            return lambda tensors: result
        size, stride, offset = result.shape, result.stride(), result.storage_offset()
        dtype, device = result.dtype, result.fake_device
        own = result.untyped_storage()._cdata
        index = next((i for i, tensor in enumerate(tensors) if tensor.untyped_storage()._cdata == own), None)
        if index is not None and result is tensors[index]:
            return lambda tensors: tensors[index]
        if index is not None:
            return lambda tensors: self._fake(
                lambda empty: empty.set_(tensors[index].untyped_storage(), offset, size, stride), dtype, device
            )
        elements = result.untyped_storage().nbytes() // result.element_size()
        if elements == result.numel() and not offset:
            return lambda tensors: self._fake(
                lambda empty: torch.empty_strided(size, stride, dtype=dtype, device="meta"), dtype, device
            )
        return lambda tensors: self._fake(
            lambda empty: empty.new_empty(elements).as_strided(size, stride, offset), dtype, device
        )

    def _fake(self, make: Callable[[Tensor], Tensor], dtype: torch.dtype, device: torch.device) -> FakeTensor:
        with in_kernel_invocation_manager(self.mode):
            meta = make(torch.empty(0, dtype=dtype, device="meta"))
        return FakeTensor(self.mode, meta, device)


def described(value: Any, tensors: list[Tensor]) -> Hashable:
    """Describe arguments by all that the shapes of results may depend on, and collect their tensors."""
    if isinstance(value, FakeTensor):
        tensors.append(value)
        return value.shape, value.stride(), value.storage_offset(), value.dtype, value.fake_device
    if isinstance(value, list | tuple):
        return tuple([described(each, tensors) for each in value])
    return value.__class__, value

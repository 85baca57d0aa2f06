"""Values of small tensors that are known, kept next to the shapes; and what is read where they are not."""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def values_of(tensor: Tensor) -> Tensor | None:
    """Return the values of a tensor, `None` if they are not known."""
    if isinstance(tensor, FakeTensor):
        return vars(tensor).get("known")
    return None if tensor.is_meta else tensor


def set_values(result: FakeTensor, values: Any, func: Any) -> None:
    """Keep the values of a result, or forget those of a tensor that was written to."""
    fits = isinstance(values, Tensor) and values.shape == result.shape
    vars(result).update(known=values.to(result.dtype) if fits else None, made_by=func)


def elements(args: Any) -> int:
    """Return the most elements that a factory called with these arguments makes."""
    sizes = args[0] if args and isinstance(args[0], list | tuple) else [each for each in args if each is not None]
    count = 1
    for size in sizes:
        count *= max(1, size) if isinstance(size, int) else 1
    return count


def placeholder(tensor: Tensor) -> bool | int | float:
    """Return 0, or what a check for finite values expects."""
    if tensor.dtype == torch.bool:
        name = str(vars(tensor).get("made_by", ""))
        return not any(part in name for part in ("any", "isnan", "isinf", "logical_or", "ne."))
    return 0.0 if tensor.dtype.is_floating_point else 0

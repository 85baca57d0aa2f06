"""Copies to an accelerator and streams on it, so that neither the host nor two kinds of work wait for each other."""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor


# Types of devices that read the host's memory while it goes on, if that memory is pinned, and that work in streams.
ASYNCHRONOUS = ("cuda", "xpu")

# Context in which a thread's work on a device is queued behind other work, see `behind`.
Behind = Callable[[], AbstractContextManager[None]]


def to_device(tensor: Tensor, device: torch.device | str | None) -> Tensor:
    """
    Return a tensor on a device, without waiting for what the device has still to do.

    The copy is queued behind that work. Its source is pinned memory, which torch keeps until the copy is done; a copy
    from pageable memory would stop the host until the device has nothing left to do.
    """
    target = tensor.device if device is None else torch.device(device)
    if tensor.device.type != "cpu" or target.type not in ASYNCHRONOUS:
        return tensor.to(target)
    return tensor.pin_memory().to(target, non_blocking=True)


def wait_for(device: torch.device) -> None:
    """Wait until a device has done all that was asked of it, so that a clock can be read."""
    if device.type in ASYNCHRONOUS:
        torch.get_device_module(device).synchronize(device)


def behind(device: torch.device) -> Behind:
    """
    Return a context for other threads, in which their work on a device is queued behind all that the calling thread
    has queued so far, but not behind what it queues later.

    The work of all these contexts shares one stream, so that it keeps its order. When a context is left, its work is
    done: the results can be read in any stream, and the memory of the arguments can be used again.
    """
    if device.type not in ASYNCHRONOUS:
        return nullcontext
    module = torch.get_device_module(device)
    queued = module.Event()
    queued.record(module.current_stream(device))
    return functools.partial(_in_second_stream, module, device, queued)


@contextmanager
def _in_second_stream(module: Any, device: torch.device, queued: Any) -> Iterator[None]:
    stream = _second_stream(module, device)
    with module.stream(stream):
        stream.wait_event(queued)
        try:
            yield
        finally:
            stream.synchronize()


@functools.cache
def _second_stream(module: Any, device: torch.device) -> Any:
    return module.Stream(device)

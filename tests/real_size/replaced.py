"""Functions of PyTorch that ask the driver, or read tensors where no mode sees it, replaced for a simulated GPU."""

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode


aten = torch.ops.aten
TOTAL = 400 * 2**30  # memory of a device without a limit


def replacements(gpu: Any) -> Iterator[AbstractContextManager[Any]]:
    """Yield context managers during which a [`SimulatedGPU`] stands for CUDA."""
    for name, function in driver(gpu).items():
        for module in (torch.cuda, torch.cuda.random):
            if name in vars(module):
                yield mock.patch.object(module, name, function)
    yield mock.patch.object(torch._C, "_cuda_isCurrentStreamCapturing", lambda: False, create=True)
    yield mock.patch.object(nn.Module, "_apply", moving(gpu))
    yield mock.patch.object(FakeTensor, "__deepcopy__", deepcopied, create=True)
    yield mock.patch.object(FakeTensor, "numpy", lambda tensor: on_cpu(tensor).numpy(), create=True)
    yield mock.patch.object(torch, "save", saving(torch.save))
    yield mock.patch.object(torch, "tensor", tensor_of(torch.tensor))
    yield mock.patch.object(threading.Thread, "run", running(gpu, threading.Thread.run))
    plain = torch.nn.functional.scaled_dot_product_attention
    yield mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", attention(plain))


def driver(gpu: Any) -> dict[str, Callable[..., Any]]:
    """Functions of `torch.cuda` for one device."""
    total = gpu.capacity or TOTAL
    state = torch.zeros(16, dtype=torch.uint8)
    properties = SimpleNamespace(name="Simulated GPU", major=9, minor=0, total_memory=total, multi_processor_count=132)
    nothing = dict.fromkeys(
        ["set_device", "_lazy_init", "empty_cache", "manual_seed", "manual_seed_all", "set_rng_state"]
        + ["set_rng_state_all", "ipc_collect", "reset_peak_memory_stats"],
        lambda *args, **kwargs: None,
    )
    answers = {
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": True,
        "_is_in_bad_fork": False,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": properties.name,
        "get_device_capability": (properties.major, properties.minor),
        "get_device_properties": properties,
        "get_rng_state": state,
        "get_rng_state_all": [state],
    }
    return {
        **nothing,
        **{name: lambda *args, answer=answer, **kwargs: answer for name, answer in answers.items()},
        "synchronize": lambda *args: gpu.wait("synchronize"),
        "Stream": Queue,
        "Event": Queue,
        "current_stream": Queue,
        "stream": lambda stream: nullcontext(),
        "mem_get_info": lambda *args: (total - gpu.current, total),
        "memory_allocated": lambda *args: gpu.current,
        "memory_reserved": lambda *args: gpu.current,
        "max_memory_allocated": lambda *args: max(gpu.peaks.values()),
    }


class Queue:
    """A stream, or an event in it. Nothing runs, so that nothing is ever waited for."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def record(self, *args: Any) -> None:
        """Do nothing."""

    wait_event = wait_stream = synchronize = record


def moving(gpu: Any) -> Callable[..., nn.Module]:
    """Return `Module._apply` that replaces parameters instead of writing to their `data`, which fakes don't allow."""

    def moved(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        gpu.moving += 1
        try:
            for part in module.modules():
                replace_tensors(part, function)
        finally:
            gpu.moving -= 1
        return module

    return moved


def replace_tensors(module: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
    """Replace the parameters and buffers of a module, without its children's."""
    for key, parameter in module._parameters.items():
        if parameter is not None:
            with torch.no_grad():
                value = function(parameter)
            if isinstance(value, FakeTensor) and value is not parameter:
                own = nn.Parameter(value, parameter.requires_grad)
                vars(own).update({name: each for name, each in vars(parameter).items() if name not in vars(own)})
                module._parameters[key] = own
            elif value is not parameter:
                parameter.data = value
    for key, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[key] = function(buffer)


def deepcopied(tensor: FakeTensor, memo: dict[int, Any]) -> Tensor:
    """Copy within `copy.deepcopy`, to memory of its own."""
    if id(tensor) not in memo:
        with torch.no_grad():
            copied: Tensor = tensor.detach().clone()
        memo[id(tensor)] = nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied
    return memo[id(tensor)]


def saving(save: Callable[..., None]) -> Callable[..., None]:
    """Return `torch.save` that writes zeros for values that are not known."""
    return lambda value, *args, **kwargs: save(on_cpu(value), *args, **kwargs)


def on_cpu(value: Any) -> Any:
    """Return a state with real tensors."""
    if isinstance(value, FakeTensor):
        return value.detach().cpu() if value.is_cuda else torch.zeros(value.shape, dtype=value.dtype)
    if type(value) in (dict, OrderedDict):
        return type(value)((name, on_cpu(each)) for name, each in value.items())
    return type(value)(map(on_cpu, value)) if type(value) in (list, tuple) else value


def tensor_of(tensor: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return `torch.tensor` that reads the tensors in a list as a dispatch mode can see."""

    def items(data: Any) -> Any:
        if isinstance(data, list | tuple):
            return [items(part) for part in data]
        return data.item() if isinstance(data, FakeTensor) else data

    return lambda data, **kwargs: tensor(items(data) if isinstance(data, list | tuple) else data, **kwargs)


class OtherThread(TorchDispatchMode):
    """The simulated GPU in another thread: a mode holds for one thread only."""

    def __init__(self, gpu: Any):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.gpu.__torch_dispatch__(func, types, args, kwargs)


def running(gpu: Any, run: Callable[..., None]) -> Callable[..., None]:
    """Return `Thread.run` in which the simulated GPU is there too."""

    def run_with_gpu(thread: threading.Thread) -> None:
        with OtherThread(gpu):
            run(thread)

    return run_with_gpu


def attention(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return scaled dot product attention by the kernel that CUDA selects: flash, or memory-efficient with a mask."""

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if not query.is_cuda or query.ndim != 4:
            return plain(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if torch.is_autocast_enabled("cuda"):
            query, key, value = (each.to(torch.get_autocast_dtype("cuda")) for each in (query, key, value))
        if enable_gqa:
            key, value = (each.repeat_interleave(query.shape[1] // each.shape[1], 1) for each in (key, value))
        size = query.shape[-1]
        options: dict[str, Any] = {"scale": size**-0.5 if scale is None else scale}
        if size % 8:
            query, key, value = (torch.nn.functional.pad(each, (0, 8 - size % 8)) for each in (query, key, value))
        if query.dtype != torch.float32 and attn_mask is None and size <= 256 and value.shape[-1] == size:
            flash = aten._scaled_dot_product_flash_attention
            return flash(query, key, value, dropout_p, is_causal, False, **options)[0][..., :size]
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                attn_mask = torch.where(attn_mask, 0.0, -math.inf).to(query.dtype)
            attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
        needs_gradient = torch.is_grad_enabled() and any(each.requires_grad for each in (query, key, value))
        efficient = aten._scaled_dot_product_efficient_attention
        return efficient(query, key, value, attn_mask, needs_gradient, dropout_p, is_causal, **options)[0][..., :size]

    return attend

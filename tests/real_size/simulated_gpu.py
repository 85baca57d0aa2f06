"""
A simulated GPU. Tensors on the CPU are real; tensors on "cuda" have device, dtype, shape and storage, but no values.

PyTorch's FakeTensorMode computes shapes and refuses operations on tensors of several devices. Around it, this mode
counts the live bytes and the floating-point operations, and records each wait of the host for the device. Small
tensors that are computed from known numbers (timesteps, masks, lengths) keep their values, because pipelines branch on
them; any other value that is read is 0.

It does not simulate numerics, speed, fragmentation, and the workspaces of kernels.
"""

import contextlib
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from real_size.places import place
from real_size.replaced import replacements
from real_size.shapes import Shapes
from real_size.values import elements, placeholder, set_values, values_of


aten = torch.ops.aten
BLOCK = 512  # PyTorch's allocator rounds sizes up to it
MOST_KNOWN = 2_000  # elements of tensors whose values are kept

MASKED = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default)
SIZED_BY_VALUES = (
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.repeat_interleave.Tensor,
)
WITHOUT_VALUES = (
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
)

FakeTensorMode.avoid_device_init = property(lambda self: True)  # type: ignore  # there is no driver


class Wait(NamedTuple):
    """
    A wait of the host for the device.

    Args:
        phase (`str`):
            Phase of the run, see [`SimulatedGPU.during`].
        kind (`str`):
            The operation: "item", "copy to the CPU", "blocking copy to the GPU", "size depends on values".
        place (`str`):
            The function of this package, or "", and after " < " the innermost function of any library.
    """

    phase: str
    kind: str
    place: str


class SimulatedGPU(TorchDispatchMode):
    """
    The device, while it is entered.

    Args:
        capacity (`float`, *optional*):
            Memory in GiB: `torch.OutOfMemoryError` is raised where more is allocated.

    Attributes:
        current, peaks (`int`, `Counter[str]`):
            Live bytes, and the most of them in each phase.
        operations (`Counter[str]`):
            Floating-point operations of each phase.
        waits (`list[Wait]`):
            Waits of the host, in their order, except those of threads that score images.
    """

    def __init__(self, capacity: float | None = None):
        super().__init__()
        self.capacity = None if capacity is None else int(capacity * 2**30)
        self.phase = ""
        self.current = 0
        self.peaks: Counter[str] = Counter()
        self.operations: Counter[str] = Counter()
        self.waits: list[Wait] = []
        self.moving = 0  # modules that are being moved, which no values are read for
        self._shapes = Shapes()
        self._fake = self._shapes.mode
        self._sizes: dict[int, tuple[int, Any]] = {}  # of live storages
        self._lock = threading.RLock()  # reward functions run in threads

    def __enter__(self) -> "SimulatedGPU":
        self._lift = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(data, device="cuda")` copies a CPU tensor
        self._replaced = contextlib.ExitStack()
        for each in replacements(self):
            self._replaced.enter_context(each)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._replaced.close()
        torch._C._set_only_lift_cpu_tensors(self._lift)

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Count what happens while the context is open under another phase."""
        before, self.phase = self.phase, phase
        self.peaks[phase] = max(self.peaks[phase], self.current)
        try:
            yield
        finally:
            self.phase = before

    # ---- Networks ----

    def without_values(self, network: nn.Module, dtype: torch.dtype) -> nn.Module:
        """Return a network that was made on "meta" with parameters on the CPU that take no memory."""
        exact = {
            *(vars(type(network)).get("_keep_in_fp32_modules") or ()),
            *(vars(type(network)).get("_keep_in_fp32_modules_strict") or ()),
        }
        made: dict[int, Tensor] = {}  # some are shared
        for name, module in network.named_modules():
            for tensors in (module._parameters, module._buffers):
                for key, value in tensors.items():
                    if value is not None:
                        own = torch.float32 if exact & set(f"{name}.{key}".split(".")) else dtype
                        kind = own if value.is_floating_point() else value.dtype
                        tensors[key] = made.setdefault(id(value), self._like(value, kind))
        return network.eval()

    def _like(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        with self._fake:
            fake = torch.empty(value.shape, dtype=dtype, device="cpu")
            return nn.Parameter(fake, value.requires_grad) if isinstance(value, nn.Parameter) else fake

    # ---- Memory ----

    def _allocate(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes or tensor.device.type != "cuda":
            return
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        if self.capacity is not None and self.current + size > self.capacity:
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {size / 2**20:.2f} MiB. GPU 0 has a total capacity of "
                f"{self.capacity / 2**30:.2f} GiB of which {(self.capacity - self.current) / 2**20:.2f} MiB "
                "is free."
            )
        self._sizes[key] = size, weakref.ref(storage, lambda _: self._free(key))
        self.current += size
        self.peaks[self.phase] = max(self.peaks[self.phase], self.current)

    def _free(self, key: int) -> None:
        self.current -= self._sizes.pop(key)[0]

    # ---- Operations ----

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with self._lock:
            kwargs = kwargs or {}
            if func is torch.ops.prim.device.default:
                return args[0].fake_device
            if func is aten._pin_memory.default:
                return pinned(args[0])
            if is_gpu(kwargs.get("device")) or any(isinstance(each, FakeTensor) for each in tensors_in(args, kwargs)):
                return self._dispatch(func, args, kwargs)
            return func(*args, **kwargs)

    def _dispatch(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        generator = kwargs.get("generator")
        if is_gpu(kwargs.get("device")) and generator is not None and not is_gpu(generator.device):
            raise RuntimeError(f"Expected a 'cuda' device type for generator but found '{generator.device}'")
        if func is aten.is_pinned.default:
            return False
        if func is aten._local_scalar_dense.default or func is aten.equal.default:
            return self._read(func, args)
        if func is aten._to_copy.default or func is aten.copy_.default:
            read = self._copied_to_the_host(func, args, kwargs)
            if read is not None:
                return read
        if func in MASKED:
            args = args[0], self._without_masks(args[1]), *args[2:]
        if func in SIZED_BY_VALUES:
            self.wait("size depends on values")
            known = self._known(func, args, kwargs)
            if known is not None:
                return tree_map_only(Tensor, self._with_values, known)
        return self._run(func, args, kwargs)

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        known = self._known(func, args, kwargs)
        if not all(isinstance(each, FakeTensor) for each in tensors_in(args, kwargs)):
            args, kwargs = tree_map_only(Tensor, self._as_fake, (args, kwargs))
        result = self._shapes.run(func, args, kwargs)
        results = [result] if isinstance(result, FakeTensor) else tree_leaves(result)
        values = [None] * len(results) if known is None else tree_leaves(known)
        for each, value in zip(results, values, strict=True):
            if isinstance(each, FakeTensor):
                self._allocate(each)
                set_values(each, value, func)
        if func._overloadpacket in flop_registry:
            self.operations[self.phase] += flop_registry[func._overloadpacket](*args, **kwargs, out_val=result)
        return result

    def _as_fake(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        with self._fake:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")

    # ---- Values ----

    def _known(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Return the results of an operation on small known tensors, `None` if they are not known."""
        if torch.Tag.nondeterministic_seeded in func.tags or func in WITHOUT_VALUES:
            return None
        tensors = tensors_in(args, kwargs)
        if any(values_of(each) is None for each in tensors):
            return None
        if sum(each.numel() for each in tensors) > MOST_KNOWN or (not tensors and elements(args) > MOST_KNOWN):
            return None
        args, kwargs = tree_map_only(Tensor, values_of, (args, kwargs))
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        try:
            return func(*args, **{name: value for name, value in kwargs.items() if name != "pin_memory"})
        except RuntimeError:  # the operation on the device raises what is wrong
            return None

    def _with_values(self, values: Tensor) -> Tensor:
        with self._fake:
            made = torch.empty_strided(values.shape, values.stride(), dtype=values.dtype, device="cuda")
        self._allocate(made)
        vars(made)["known"] = values
        return made

    # ---- Waits ----

    def wait(self, kind: str) -> None:
        """Record a wait, unless it is of a thread that scores images."""
        if threading.current_thread().name != "reward":
            self.waits.append(Wait(self.phase, kind, place()))

    def _read(self, func: Any, args: Any) -> Any:
        self.wait("item" if func is aten._local_scalar_dense.default else "equal")
        known = [values_of(each) for each in args]
        if all(each is not None for each in known):
            return func(*known)
        if func is aten.equal.default:
            return args[0].shape == args[1].shape
        return placeholder(args[0])

    def _copied_to_the_host(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor | None:
        """Return the real tensor that a copy from the device gives, `None` for copies to it and within it."""
        if func is aten._to_copy.default and kwargs.get("device") is None:
            return None
        target, source = (None, args[0]) if func is aten._to_copy.default else args[:2]
        if target is None and torch.device(kwargs["device"]).type == "meta":  # a forecast is being made
            return torch.empty_strided(source.shape, source.stride(), dtype=source.dtype, device="meta")
        if is_gpu(kwargs["device"] if target is None else target.device):
            # Of pageable memory, copies that don't block wait too.
            queued = (kwargs.get("non_blocking") or args[2:3] == (True,)) and "pinned" in vars(source)
            if not is_gpu(source.device) and not queued and not self.moving:
                self.wait("blocking copy to the GPU")
            return None
        if self.moving or (isinstance(target, FakeTensor) and not is_gpu(source.device)):
            return None
        if is_gpu(source.device):
            self.wait("copy to the CPU")
        known = values_of(source)
        if target is not None:
            return target.copy_(known) if known is not None else target.zero_()
        dtype = kwargs.get("dtype") or source.dtype
        return known.to(dtype, copy=True) if known is not None else torch.zeros(source.shape, dtype=dtype)

    def _without_masks(self, indices: Any) -> list[Any]:
        """Return the indices that masks select: all, where their values are not known."""
        result: list[Any] = []
        for index in indices:
            if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
                self.wait("index with a mask")
                known = values_of(index)
                known = torch.ones(index.shape) if known is None else known
                result += [self._with_values(each) for each in known.bool().nonzero(as_tuple=True)]
            else:
                if isinstance(index, Tensor) and not isinstance(index, FakeTensor):
                    self.wait("index from the CPU")
                result.append(index)
        return result


def tensors_in(args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the tensors among the arguments of an operation: single ones, and those in lists."""
    found: list[Tensor] = []
    for each in (*args, *kwargs.values()):
        if isinstance(each, Tensor):
            found.append(each)
        elif isinstance(each, list | tuple):
            found += [part for part in each if isinstance(part, Tensor)]
    return found


def pinned(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor in memory that the device can read while the host goes on."""
    copied = tensor.detach().clone()
    vars(copied)["pinned"] = True
    return copied


def is_gpu(device: Any) -> bool:
    """Return whether a device, its name or `None` is the GPU."""
    return device is not None and torch.device(device).type == "cuda"

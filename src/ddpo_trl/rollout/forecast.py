"""
Forecast of GPU memory, before anything has run at its full size.

The networks are run once for one sample and once for two, with the arguments that the pipeline gives them, as copies
on PyTorch's "meta" device, whose tensors have shapes and no memory. The bytes that would be live are counted.
"""

import copy
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ddpo_trl.config import DDPOConfig
from ddpo_trl.policy.embeddings import text_encoders
from ddpo_trl.policy.policy import Policy
from ddpo_trl.policy.records import Context


ALLOCATION = 512  # PyTorch's allocator for CUDA rounds sizes up to it
ADAMW_MOMENTS = 2  # tensors of the size of each trained weight


class Cost(NamedTuple):
    """Bytes of something for a batch of any size: a part for each sample, and a fixed part."""

    fixed: int
    per_sample: int

    def of(self, samples: int) -> int:
        """Return the bytes for a batch of `samples`."""
        return self.fixed + samples * self.per_sample


@dataclass(frozen=True, kw_only=True)
class MemoryForecast:
    """
    Forecast of the bytes that live on the GPU, without what the reward functions and CUDA itself take.

    Args:
        resident (`int`):
            Networks that stay there, and the state of AdamW.
        visiting (`int`):
            Text encoders that come to encode prompts only.
        alone (`bool`):
            Whether they come only while no other network is there.
        denoising, decoding ([`Cost`]):
            A denoising step without gradients, and the autoencoder, in addition.
        training, checkpointed ([`Cost`]):
            Forward and backward pass of a denoising step, without and with activation checkpointing, in addition.
        gradient_bytes (`int`):
            Gradient of one sample, which one pass keeps for each.
    """

    resident: int
    visiting: int
    alone: bool
    denoising: Cost
    decoding: Cost
    training: Cost
    checkpointed: Cost
    gradient_bytes: int

    @property
    def encoding(self) -> int:
        """Peak of encoding prompts."""
        return self.visiting if self.alone else self.visiting + self.resident

    def sampling(self, batch_size: int) -> int:
        """Peak of sampling a batch without gradients."""
        return self.resident + max(self.denoising.of(batch_size), self.decoding.of(batch_size))

    def updating(self, batch_size: int, one_pass: bool, checkpointing: bool) -> int:
        """Peak of the forward and backward pass of a batch."""
        cost = self.checkpointed if checkpointing else self.training
        return self.resident + cost.of(batch_size) + one_pass * batch_size * self.gradient_bytes

    def largest_batch(self, available: int, one_pass: bool, checkpointing: bool) -> int:
        """Return the largest batch that can be sampled and trained on in `available` bytes; 0 if there is none."""
        if self.encoding > available:
            return 0
        sizes = itertools.takewhile(
            lambda size: max(self.sampling(size), self.updating(size, one_pass, checkpointing)) <= available,
            range(1, 1025),
        )
        return max(sizes, default=0)


def forecast(policy: Policy, context: Context, config: DDPOConfig, alone: bool = False) -> MemoryForecast:
    """
    Forecast the memory of a policy.

    Args:
        policy ([`~ddpo_trl.policy.policy.Policy`]):
            The policy, after [`~Policy.probe_schedule`]. Its networks are not run.
        context ([`~ddpo_trl.policy.records.Context`]):
            One or two samples. From one alone, all of its bytes count as growing with the batch.
        config ([`DDPOConfig`]):
            Settings: what is offloaded.
        alone (`bool`, *optional*, defaults to `False`):
            Whether offloaded text encoders encode all prompts before the other networks are on the GPU.

    Raises:
        `ValueError` or any error of a network: If a network can't be run without memory.
    """
    if config.mixed_precision != "no":
        raise ValueError("of autocast it is not known what is kept in which precision")
    pipeline: Any = policy.pipeline
    vae = pipeline.components.get("vae")
    denoiser, decoder = without_memory(policy.denoiser), None if vae is None else without_memory(vae)
    denoising, decoding = [], []
    for size in range(1, len(context) + 1):
        with ExitStack() as stack:
            steps = stack.enter_context(replaced(policy.denoiser, "forward", denoiser.forward))
            images = [] if decoder is None else stack.enter_context(replaced(vae, "decode", decoder.decode))
            policy.sample(context.rows(range(size)), max_steps=1)
        if not steps:
            raise ValueError("the denoiser was not called, or is compiled")
        denoising.append(max(call.peak for call in steps))
        decoding.append(max((call.peak for call in images), default=0))
    trained = sum(parameter.nbytes for parameter in policy.denoiser.parameters() if parameter.requires_grad)
    encoders = text_encoders(pipeline)
    visiting = weight_bytes(encoders.values()) if config.offload_text_encoders else 0
    staying = {name: part for name, part in networks(pipeline).items() if not visiting or name not in encoders}
    resident = weight_bytes(staying.values()) + ADAMW_MOMENTS * trained
    if config.offload_vae:
        resident -= weight_bytes([vae])
        decoding = [peak + weight_bytes([vae]) for peak in decoding]
    if policy.adapter is None and config.kl_coef > 0:
        resident += weight_bytes([policy.denoiser])  # the reference policy
    training = training_cost(denoiser, steps, len(context), trained)
    denoiser.enable_gradient_checkpointing()
    return MemoryForecast(
        resident=resident,
        visiting=visiting,
        alone=alone,
        denoising=cost(denoising),
        decoding=cost(decoding),
        training=training,
        checkpointed=training_cost(denoiser, steps, len(context), trained),
        gradient_bytes=4 * sum(parameter.numel() for parameter in policy.parameters() if parameter.requires_grad),
    )


def networks(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    """Return the networks of a pipeline by name."""
    return {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}


def weight_bytes(parts: Any) -> int:
    """Return the bytes of all weights of networks."""
    tensors = {id(tensor): tensor for part in parts for tensor in (*part.parameters(), *part.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())


# ---- Calls of the networks ----


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
        args, kwargs = tree_map_only(Tensor, on_meta, (args, kwargs))
        with linear_attention(), LiveBytes() as live, torch.no_grad():
            result = copied(*args, **kwargs)
        calls.append(Call(args, kwargs, live.peak))
        return tree_map_only(Tensor, lambda each: torch.zeros_like(each, device=device), result)

    vars(network)[method] = recorded
    try:
        yield calls
    finally:
        del vars(network)[method]


def on_meta(tensor: Tensor) -> Tensor:
    """Return a tensor like another without memory."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def without_memory(network: Any) -> Any:
    """Return a copy of a network whose weights have no memory."""
    if "quantization_config" in network.config:
        raise ValueError(f"{type(network).__name__} is quantized")
    memo: dict[int, Any] = {}
    for parameter in network.parameters():
        memo[id(parameter)] = nn.Parameter(on_meta(parameter), parameter.requires_grad)
    memo |= {id(buffer): on_meta(buffer) for buffer in network.buffers()}
    return copy.deepcopy(network, memo)


# ---- Counting ----


class LiveBytes(TorchDispatchMode):
    """Count the bytes of the tensors that are made while it is entered; `peak` is the most of them at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._current = 0
        self._live: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            for tensor in tree_leaves(result):
                if isinstance(tensor, Tensor):
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

    def attend(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return (attention if query.is_meta else plain)(query, *args, **kwargs)

    functions["scaled_dot_product_attention"] = attend
    try:
        yield
    finally:
        functions["scaled_dot_product_attention"] = plain


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` by the memory-efficient kernel."""
    if enable_gqa:
        key, value = (each.repeat_interleave(query.shape[1] // each.shape[1], 1) for each in (key, value))
    if attn_mask is not None:
        attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:3], key.shape[2])
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    return kernel(query, key, value, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale)[0]


def training_cost(denoiser: Callable[..., Any], calls: Sequence[Call], samples: int, trained: int) -> Cost:
    """Return the cost of calls of a denoiser and the backward pass through all of them, with `trained` bytes."""
    with linear_attention(), LiveBytes() as live:
        results = tree_leaves([denoiser(*call.args, **call.kwargs) for call in calls])
        outputs = [result for result in results if isinstance(result, Tensor)]
        torch.autograd.backward(outputs, outputs)
    return Cost(trained, (live.peak - trained) // samples)


def cost(sizes: Sequence[int]) -> Cost:
    """Return the cost for any batch, given the bytes of one sample, and of two if they are known."""
    one, two = sizes[0], sizes[-1]
    return Cost(one - (two - one), two - one) if len(sizes) > 1 else Cost(0, one)

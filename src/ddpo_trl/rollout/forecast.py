"""
Forecast of GPU memory, before anything has run at its full size.

The networks are run once for one sample and once for two, with the arguments that the pipeline gives them, as copies
on PyTorch's "meta" device, whose tensors have shapes and no memory. The bytes that would be live are counted.
"""

import itertools
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from diffusers import DiffusionPipeline
from torch import nn

from ddpo_trl.config import DDPOConfig
from ddpo_trl.policy.embeddings import text_encoders
from ddpo_trl.policy.policy import Policy
from ddpo_trl.policy.records import Context
from ddpo_trl.policy.without_memory import Call, NoForecast, backward_peak, replaced, without_memory


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
            A denoising step without gradients, and decoding, with the autoencoder if that comes for it, in addition.
        training ([`Cost`]), checkpointed ([`Cost`], *optional*):
            Forward and backward pass of a denoising step, without and with activation checkpointing, in addition.
            `None` if the denoiser has no checkpointing.
        gradient_bytes (`int`):
            Gradient of one sample, which one pass keeps for each.
    """

    resident: int
    visiting: int
    alone: bool
    denoising: Cost
    decoding: Cost
    training: Cost
    checkpointed: Cost | None
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
        cost = self.checkpointed if checkpointing and self.checkpointed else self.training
        return self.resident + cost.of(batch_size) + one_pass * batch_size * self.gradient_bytes

    def peaks(self, sampled: int, trained: int | None, checkpointing: bool, kept: int) -> dict[str, int]:
        """
        Return the peak of each part of a round.

        Args:
            sampled (`int`), trained (`int`, *optional*):
                Sizes of the batches; `None` for one pass.
            checkpointing (`bool`):
                Whether activations are computed again in the backward pass.
            kept (`int`):
                Bytes of the rollout.
        """
        peaks = {"encoding": self.encoding, "sampling": self.sampling(sampled) + kept}
        if trained is None:
            peaks["sampling"] = max(peaks["sampling"], self.updating(sampled, True, checkpointing) + kept)
        else:
            peaks["training"] = self.updating(trained, False, checkpointing) + kept
        return peaks

    def largest_batch(self, available: int, one_pass: bool, checkpointing: bool) -> int:
        """Return the largest batch that can be sampled and trained on in `available` bytes; 0 if there is none."""
        if self.encoding > available:
            return 0
        sizes = itertools.takewhile(
            lambda size: max(self.sampling(size), self.updating(size, one_pass, checkpointing)) <= available,
            range(1, 1025),
        )
        return max(sizes, default=0)


def forecast_or_reason(policy: Policy, context: Context, config: DDPOConfig, alone: bool) -> MemoryForecast | str:
    """Return the result of [`forecast`], or the reason why there is none: it never ends a run."""
    try:
        return forecast(policy, context, config, alone)
    except Exception as error:  # whatever a network does without values
        what = str(error).partition("\n")[0] or type(error).__name__
        return what if isinstance(error, NoForecast) else f"a network can't be run without values ({what})"


def forecast(policy: Policy, context: Context, config: DDPOConfig, alone: bool) -> MemoryForecast:
    """
    Forecast the memory of a policy.

    Args:
        policy ([`~ddpo_trl.policy.policy.Policy`]):
            The policy, after [`~Policy.probe_schedule`]. Its networks are not run.
        context ([`~ddpo_trl.policy.records.Context`]):
            One or two samples. From one alone, all of its bytes count as growing with the batch.
        config ([`DDPOConfig`]):
            Settings: what is offloaded.
        alone (`bool`):
            Whether offloaded text encoders encode all prompts before the other networks are on the GPU.

    Raises:
        [`~ddpo_trl.policy.without_memory.NoForecast`] or any error of a network: If it can't be run without memory.
    """
    if config.mixed_precision != "no":
        raise NoForecast("it is not known for autocast, which decides on the precision of each operation")
    pipeline: Any = policy.pipeline
    vae = pipeline.components.get("vae")
    denoiser, decoder = without_memory(policy.denoiser), None if vae is None else without_memory(vae)
    if decoder is not None:
        vars(decoder).pop("decode", None)  # which moves the autoencoder, if that is offloaded
    denoising, decoding = [], []
    for size in range(1, len(context) + 1):
        with ExitStack() as stack:
            steps = stack.enter_context(replaced(policy.denoiser, "forward", denoiser.forward))
            images = [] if decoder is None else stack.enter_context(replaced(vae, "decode", decoder.decode))
            policy.sample(context.rows(range(size)), max_steps=1)
        if not steps:
            raise NoForecast("the denoiser was not called, or is compiled")
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
    checkpointed = None
    with suppress(ValueError):  # not all denoisers have it
        denoiser.enable_gradient_checkpointing()
        checkpointed = training_cost(denoiser, steps, len(context), trained)
    return MemoryForecast(
        resident=resident,
        visiting=visiting,
        alone=alone,
        denoising=cost(denoising),
        decoding=cost(decoding),
        training=training,
        checkpointed=checkpointed,
        gradient_bytes=4 * sum(parameter.numel() for parameter in policy.parameters() if parameter.requires_grad),
    )


def networks(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    """Return the networks of a pipeline by name."""
    return {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}


def weight_bytes(parts: Any) -> int:
    """Return the bytes of all weights of networks."""
    tensors = {id(tensor): tensor for part in parts for tensor in (*part.parameters(), *part.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())


def training_cost(denoiser: nn.Module, calls: Sequence[Call], samples: int, trained: int) -> Cost:
    """Return the cost of a training step, given the calls of the denoiser for some samples. All share a gradient."""
    return Cost(trained, (backward_peak(denoiser.forward, calls) - trained) // samples)


def cost(sizes: Sequence[int]) -> Cost:
    """Return the cost for any batch, given the bytes of one sample, and of two if they are known."""
    one, two = sizes[0], sizes[-1]
    return Cost(one - (two - one), two - one) if len(sizes) > 1 else Cost(0, one)

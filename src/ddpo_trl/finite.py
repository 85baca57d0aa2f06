"""Checks for NaN and infinity: of images before scoring, gradients before an update, weights before saving."""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


CAUSES = "Usual causes: a learning rate that is too high, or an overflow in half precision (use bf16=True or float32)."


class NotFiniteError(RuntimeError):
    """A NaN or an infinity that would have reached rewards, weights or a file."""


def finite_rows(values: Tensor) -> Tensor:
    """Return which samples of `(B, ...)` hold neither NaN nor infinity, `(B,)`, without waiting for the device."""
    return values.flatten(1).isfinite().all(1)


def image_problem(
    when: str, index: int, prompt: str, finite_steps: Sequence[int] | None, steps: int
) -> NotFiniteError:
    """
    Return the error for an image that is not finite. It names the policy: no reward function has seen the image.

    Args:
        when (`str`):
            Round or evaluation in which it was sampled.
        index (`int`):
            Index in its batch.
        prompt (`str`):
            Prompt of the image.
        finite_steps (`Sequence[int]` of length `B`, *optional*):
            Number of denoising steps of each sample after which its latents were finite; `None` if unknown.
        steps (`int`):
            Number of denoising steps.
    """
    if finite_steps is None:
        where = f"The denoiser or the autoencoder overflowed, or the weights diverged. {CAUSES}"
    elif finite_steps[index] < steps:
        step = finite_steps[index]
        where = f"Its latents are not finite after denoising step {step} (of 0 to {steps - 1}). {CAUSES}"
    else:
        where = (
            f"Its latents are finite after all {steps} denoising steps, so the autoencoder overflowed: keep it in "
            "float32 (pipeline.vae.to(torch.float32)) or bfloat16."
        )
    return NotFiniteError(
        f"The policy sampled an image that is not finite ({when}, image {index} of its batch, prompt {prompt!r}). "
        f"{where}"
    )


def check_update(accelerator: Accelerator, parameters: Iterable[nn.Parameter], loss: Tensor, when: str) -> None:
    """
    Raise before an optimizer step that would make the weights NaN. All processes raise together.

    fp16's loss scaler skips such steps and lowers its scale, so there a gradient that is not finite counts only when
    the scale is 1 or less. DeepSpeed hides its gradients; the loss is checked in any case.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            The Trainer's.
        parameters (`Iterable[torch.nn.Parameter]`):
            Trained parameters, with their gradients.
        loss (`torch.Tensor` of shape `()`):
            Sum of the losses of the update's micro-batches on this process.
        when (`str`):
            Name of the update, for the message.

    Raises:
        [`NotFiniteError`]: If the loss or the gradient's norm is not finite.
    """
    figures = {"loss": accelerator.reduce(loss.detach().float(), reduction="mean")}
    scaler = accelerator.scaler
    if accelerator.distributed_type != DistributedType.DEEPSPEED and (scaler is None or scaler.get_scale() <= 1):
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        figures["gradient norm"] = gathered(nn.utils.get_total_norm(gradients)).to(loss.device)
    values = torch.stack([value.float() for value in figures.values()]).tolist()  # the one wait for the device
    if not all(map(math.isfinite, values)):
        named = ", ".join(f"{name} {value}" for name, value in zip(figures, values, strict=True))
        raise NotFiniteError(
            f"The gradient of {when} is not finite ({named}), so the run stops before the round is saved. {CAUSES}"
        )


def gathered(value: Tensor) -> Tensor:
    """Return a scalar computed from shards as a plain tensor. All processes have to call it where there are shards."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def check_weights(weights: Mapping[str, Tensor], directory: object) -> None:
    """
    Raise before weights that are not finite are written.

    Raises:
        [`NotFiniteError`]: With the number of such tensors and the name of the first.
    """
    if broken := [name for name, value in weights.items() if not gathered(value.isfinite().all())]:
        raise NotFiniteError(
            f"{len(broken)} of {len(weights)} trained tensors are not finite, {broken[0]} first; nothing was written "
            f"to {directory}. {CAUSES}"
        )

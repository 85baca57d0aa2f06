"""Whether a round can be trained in one pass, and what the rewards make of the gradients it kept."""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import psutil
import torch
from torch import Tensor

from ddpo_trl.config import DDPOConfig
from ddpo_trl.plan import BatchPlan
from ddpo_trl.policy import Policy
from ddpo_trl.sample_gradients import SampleGradients, TrainedLayer, row_layout, trained_layers, trained_weights
from ddpo_trl.types import Context, SampledBatch


# A wrong layout of the rows is off by the size of the gradient itself; bfloat16 rounds by a few percent.
TOLERANCE = 0.05

# What the gradients may take of the memory that is free when training starts.
MEMORY_SHARE = 0.5


def choose_passes(
    config: DDPOConfig, policy: Policy, trial: Context, plan: BatchPlan
) -> tuple[BatchPlan, dict[TrainedLayer, int]]:
    """
    Decides between one pass and two.

    Args:
        config ([`DDPOConfig`]):
            `one_pass` and what may stand against it.
        policy ([`~ddpo_trl.policy.Policy`]):
            Tried on a step, to tell the gradients of single samples apart.
        trial ([`~ddpo_trl.types.Context`] of length 2):
            Two samples for it.
        plan ([`~ddpo_trl.plan.BatchPlan`]):
            The sizes.

    Returns:
        The plan with the decision, and the layers to watch in one pass, see [`~Policy.sample_with_gradients`].

    Raises:
        `ValueError`: If `one_pass` is `True` and it is not possible.
    """
    reason = "one_pass is False" if config.one_pass is False else config.reason_for_two_passes
    layers: dict[TrainedLayer, int] = {}
    weights = sum(parameter.numel() for parameter in policy.parameters() if parameter.requires_grad)
    plan = dataclasses.replace(plan, one_pass=True, gradient_bytes=4 * weights)
    if reason is None:
        try:
            check_memory(plan.rollout_bytes, torch.device("cpu") if config.offload_rollout else config.device)
            layers = layers_of_samples(policy, trial, plan.trainable_steps[0])
        except ValueError as error:
            if config.one_pass:
                raise ValueError(f"one_pass is True, but {error}. Leave one_pass out to take two passes.") from error
            reason = str(error)
    return dataclasses.replace(plan, one_pass=reason is None, two_passes_because=reason), layers


def check_memory(needed: int, device: torch.device) -> None:
    """
    Raises a `ValueError` if the gradients of a round would not fit.

    Args:
        needed (`int`):
            Bytes.
        device (`torch.device`):
            Where they are kept.
    """
    on_gpu = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else psutil.virtual_memory().available
    if needed > MEMORY_SHARE * free:
        remedy = "; offload_rollout=True keeps them in CPU memory" if on_gpu else ""
        raise ValueError(
            f"the gradients of a round's samples take {needed / 2**30:.3g} GiB, and {free / 2**30:.3g} GiB are free"
            f"{remedy}"
        )


def layers_of_samples(policy: Policy, trial: Context, step: int) -> dict[TrainedLayer, int]:
    """
    The layers to watch, each with its layout of rows, found by running a step of two samples and tried on it.

    Args:
        policy ([`~ddpo_trl.policy.Policy`]):
            The policy.
        trial ([`~ddpo_trl.types.Context`] of length 2):
            Two samples.
        step (`int`):
            Index of a denoising step that is trained on.

    Raises:
        `ValueError`: If gradients can't be told apart by sample.
    """
    layers = dict.fromkeys(trained_layers(policy.denoiser), 1)
    weights = trained_weights(layers)
    recorded = policy.sample(trial, record={step}, max_steps=step + 1).steps.get(step)
    if recorded is None:
        raise ValueError(f"the pipeline ends before step {step}")
    gradients = SampleGradients(layers, batch_size=2)
    with _shaken(weights), gradients.watching(), torch.enable_grad():
        log_probs = policy(step, recorded.latents, recorded.next_latents, trial).log_probs
        if not log_probs.requires_grad:
            raise ValueError(f"no gradient reaches the trained layers at step {step}")
        _find_layouts(gradients, log_probs, layers)
        shares = torch.tensor([1.0, -2.0], device=log_probs.device)
        expected = torch.autograd.grad(shares @ log_probs, weights, retain_graph=True, allow_unused=True)
        gradients.add(log_probs)
    found = [torch.tensordot(shares, each, dims=1) for each in gradients.sums]
    wanted = [torch.zeros_like(own) if grad is None else grad for own, grad in zip(found, expected, strict=True)]
    difference, size = (
        sum(each.square().sum().item() for each in tensors) ** 0.5
        for tensors in ([own - other for own, other in zip(found, wanted, strict=True)], wanted)
    )
    if not difference <= TOLERANCE * size:
        raise ValueError("the gradients of single samples don't add up to that of the batch")
    return layers


def _find_layouts(gradients: SampleGradients, log_probs: Tensor, layers: dict[TrainedLayer, int]) -> None:
    """Fills in the layouts, from the log-probabilities of two samples."""
    outputs = [call.outputs for call in gradients.calls]
    first, second = (torch.autograd.grad(each, outputs, retain_graph=True, allow_unused=True) for each in log_probs)
    for call, of_first, of_second in zip(gradients.calls, first, second, strict=True):
        if of_first is not None and of_second is not None:  # else no gradient ever gets there
            layers[call.layer] = row_layout(of_first, of_second)


@contextmanager
def _shaken(weights: Sequence[torch.nn.Parameter]) -> Iterator[None]:
    """Other weights while the context is open: at LoRA's start one factor is 0, and no gradient reaches the other."""
    kept = [weight.detach().clone() for weight in weights]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in weights:
            weight.add_(0.01 * torch.randn(weight.shape, generator=generator).to(weight))
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, kept, strict=True):
                weight.copy_(value)


def policy_gradient(batches: Sequence[SampledBatch], advantages: Tensor) -> list[Tensor]:
    """
    The gradient of the loss −mean(A · log π) over all samples and steps, from the gradients that were kept.

    g = −Σ_i A_i Σ_t w_t ∇log π(a_it | s_it) / (N·T): eq. 6 of https://huggingface.co/papers/2305.13301, averaged as
    [`~ddpo_trl.objectives.score_function`] averages. The gradients are given back to memory.

    Args:
        batches (`Sequence[SampledBatch]`):
            Those of a round on this process.
        advantages (`torch.Tensor` of shape `(N,)`):
            Of all their samples.

    Returns:
        `list[torch.Tensor]`: one of each trained parameter's shape.
    """
    size, steps = len(batches[0].context), 1
    sums: list[Tensor] = []
    for batch, own in zip(batches, advantages.split(size), strict=True):
        assert batch.gradients is not None, "only batches of one pass come here"
        steps = batch.gradients.log_probs.shape[1]
        parts = [_weighted_sum(own.to(each.device), each) for each in batch.gradients.weights]
        batch.gradients.weights.clear()
        sums = [before + part for before, part in zip(sums, parts, strict=True)] if sums else parts
    return [-each / (len(advantages) * steps) for each in sums]


def _weighted_sum(advantages: Tensor, gradients: Tensor) -> Tensor:
    """Σ_i A_i g_i over `(B, ...)` gradients, which it may change: a dropped sample's may be NaN, and so is 0 · NaN."""
    dropped = (advantages == 0).view(-1, *[1] * (gradients.ndim - 1))
    return torch.tensordot(advantages, gradients.masked_fill_(dropped, 0.0), dims=1)

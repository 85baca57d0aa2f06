"""Choice between one pass and two, and the policy gradient from per-sample gradients."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

import psutil
import torch
from accelerate.utils import get_max_memory
from accelerate.utils.memory import clear_device_cache
from torch import Tensor

from ddpo_trl.config import DDPOConfig
from ddpo_trl.config_checks import one_pass_disabled_reason
from ddpo_trl.distributed import first_reason, smallest
from ddpo_trl.policy.denoiser import is_compiled
from ddpo_trl.policy.per_sample_gradients import (
    Call,
    SampleGradients,
    TrainedLayer,
    Watch,
    reached_rows,
    row_layout,
    trained_layers,
    trained_weights,
    weight_gradients,
)
from ddpo_trl.policy.policy import Policy
from ddpo_trl.policy.records import Context, SampledBatch
from ddpo_trl.policy.sampling import differentiate
from ddpo_trl.policy.schedulers.actions import NoGradient
from ddpo_trl.rollout.plan import BatchPlan
from ddpo_trl.rollout.trial import TRIAL_SAMPLES


# A wrong layout of the rows is off by the size of the gradient itself; bfloat16 rounds by a few percent.
TOLERANCE = 0.05

# Share of the memory that is free when training starts which the gradients may take.
MEMORY_SHARE = 0.5


def choose_passes(
    config: DDPOConfig, policy: Policy, trial: Context, plan: BatchPlan
) -> tuple[BatchPlan, dict[TrainedLayer, int]]:
    """
    Choose between one pass and two, on all processes alike: if one of them can't take one pass, none does. All
    processes have to call it.

    Args:
        trial ([`~ddpo_trl.policy.records.Context`]):
            Two samples, of which a step is differentiated; one if that is the batch size.

    Returns:
        The plan with the decision, and the layers to watch in one pass, see [`~Policy.sample_with_gradients`].

    Raises:
        `ValueError`: If `one_pass` is `True` and it is not possible.
    """
    reason = "one_pass is False" if config.one_pass is False else one_pass_disabled_reason(config)
    weights = sum(parameter.numel() for parameter in policy.parameters() if parameter.requires_grad)
    plan = dataclasses.replace(plan, one_pass=True, gradient_bytes=4 * weights)
    if reason is None:
        layers, samples, own_reason = _try_one_pass(config, policy, trial, plan)
        reason = first_reason(own_reason)
        if reason and config.one_pass:
            raise ValueError(f"one_pass is True, but {reason}. Leave one_pass out to take two passes.")
    if reason:
        return dataclasses.replace(plan, one_pass=False, one_pass_disabled_reason=reason), {}
    samples = smallest(samples)
    in_parts = samples < plan.per_device_sample_batch_size
    return dataclasses.replace(plan, samples_per_part=samples if in_parts else None), layers


def _try_one_pass(
    config: DDPOConfig, policy: Policy, trial: Context, plan: BatchPlan
) -> tuple[dict[TrainedLayer, int], int, str | None]:
    """
    Return the layers to watch and the number of samples whose gradients are taken at once, or the reason why this
    process can't take one pass.
    """
    if is_compiled(policy.denoiser):
        what = f"pipeline.{policy.denoiser_name} is compiled"
        return {}, 0, f"{what}, and hooks on each trained layer would split its graphs"
    try:
        check_memory(plan.rollout_bytes, torch.device("cpu") if config.offload_rollout else config.device)
        layers, samples = choose_samples_per_part(config, policy, trial, plan)
        if config.one_pass is None:
            check_speed(plan, samples)
    except (ValueError, NoGradient) as error:
        return {}, 0, str(error)
    return layers, samples, None


def choose_samples_per_part(
    config: DDPOConfig, policy: Policy, trial: Context, plan: BatchPlan
) -> tuple[dict[TrainedLayer, int], int]:
    """
    Choose the number of samples whose gradients are taken at once: `per_device_train_batch_size`, or the first of its
    half, its quarter, ... whose activations fit in memory.

    This is the only place that chooses it. It tries a step; a forecast of the memory would replace that.

    Returns:
        The layers to watch, see [`layers_of_samples`], and the number of samples.

    Raises:
        `ValueError`: If the gradients of one sample don't fit, or those of single samples can't be separated.
    """
    samples = min(plan.per_device_sample_batch_size, plan.per_device_train_batch_size)
    step = plan.trainable_steps[0]
    layers: dict[TrainedLayer, int] = {}

    def separate(few: int) -> None:
        layers.update(layers_of_samples(policy, trial.rows(range(few)), step))

    def take(samples: int) -> None:
        others = 0 if config.offload_rollout else plan.samples_per_process - samples
        kept = plan.gradient_bytes * (others + 3)  # of other samples, of the round, and two states of AdamW
        reserve = torch.empty(kept, dtype=torch.uint8, device=config.device)
        call = policy.runner.calls.split(trial.rows([row % len(trial) for row in range(samples)]))[0]
        gradients = SampleGradients(layers, len(call))
        with gradients.watch.watching():
            differentiate(policy.runner, call, step, gradients.add)
        del reserve

    trial = trial.rows(range(min(samples, len(trial))))
    if (few := _first_that_fits(len(trial), separate)) < len(trial):
        samples = few
    if reports_shortage(config.device):
        samples = _first_that_fits(samples, take)
    return layers, samples


def _first_that_fits(samples: int, run: Callable[[int], None]) -> int:
    """Return the first of a number of samples, its half, its quarter, ... that does not run out of memory."""
    message = ""
    while samples:
        try:
            run(samples)
            return samples
        except torch.OutOfMemoryError as error:
            message, _, _ = str(error).partition(". GPU")
        # Only here are the error and its frames, which hold the tensors, released.
        clear_device_cache(garbage_collection=True)
        samples = -(-samples // 2) if samples > 1 else 0
    raise ValueError(f"a step of one sample with gradients needs more memory than there is ({message})")


def check_speed(plan: BatchPlan, samples: int) -> None:
    """
    Raise a `ValueError` if one pass in parts of `samples` may be slower than two passes: those run the steps that are
    not trained on with whole batches.
    """
    trained, steps = plan.transitions_per_sample, len(plan.stds)
    if samples < plan.per_device_sample_batch_size and 2 * trained < steps:
        raise ValueError(
            f"only {trained} of {steps} steps are trained on, and all would run in parts of {samples} samples"
        )


def reports_shortage(device: torch.device) -> bool:
    """Return whether a lack of memory is an error; in the host's memory it ends the process."""
    return device.type not in ("cpu", "mps")


def autocast(config: DDPOConfig) -> AbstractContextManager[None]:
    """Return the context that `accelerator.autocast()` will be, before there is an accelerator."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    if config.mixed_precision not in dtypes:
        return contextlib.nullcontext()
    return torch.autocast(config.device.type, dtype=dtypes[config.mixed_precision])


def check_memory(needed: int, device: torch.device) -> None:
    """Raise a `ValueError` if the gradients of a round, of `needed` bytes on `device`, would not fit."""
    free = free_memory(device)
    if needed > MEMORY_SHARE * free:
        remedy = "; offload_rollout=True keeps them in CPU memory" if device.type != "cpu" else ""
        raise ValueError(
            f"the gradients of a round's samples take {needed / 2**30:.3g} GiB, and {free / 2**30:.3g} GiB are free"
            f"{remedy}"
        )


def free_memory(device: torch.device) -> int:
    """Return the bytes that this process may still use; of the host's memory, its share among the processes there."""
    if device.type == "cuda":
        # What torch's allocator holds and does not use is this process's too.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type not in ("cpu", "mps"):  # the latter computes in the host's memory
        return get_max_memory()[device.index or 0]
    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def layers_of_samples(policy: Policy, trial: Context, step: int) -> dict[TrainedLayer, int]:
    """
    Find the layers to watch, each with its layout of rows, by differentiating a step of two samples, one after the
    other. All rows of a single sample are its own.

    Args:
        policy ([`~ddpo_trl.policy.policy.Policy`]):
            The policy.
        trial ([`~ddpo_trl.policy.records.Context`]):
            Two samples, or one if batches never have more.
        step (`int`):
            Index of a denoising step that is trained on.

    Raises:
        `ValueError`: If the gradients of single samples can't be separated.
    """
    layers = trained_layers(policy.denoiser)
    trial = policy.runner.calls.split(trial)[0]
    with _shaken(trained_weights(layers)):
        tries = [_differentiated(policy, trial, step, layers, sample) for sample in range(len(trial))]
    if not sum(each.missed for each in tries) <= TOLERANCE**2 * sum(each.size for each in tries):
        raise ValueError("the gradients of single samples don't add up to that of the batch")
    layouts = dict.fromkeys(layers, 1)
    if len(trial) == TRIAL_SAMPLES:
        first, second = (each.rows for each in tries)
        for number in first.keys() & second.keys():  # else no gradient ever gets there
            (layer, of_first), (_, of_second) = first[number], second[number]
            layouts[layer] = row_layout(of_first, of_second)
    return layouts


class _Differentiated(NamedTuple):
    """
    Gradient of the log-probability of one sample of a batch: by the number of a layer's call, the layer and the rows
    of its outputs that the gradient reaches; the squared distance between the sum of the rows' products and PyTorch's
    gradient of the weights; and the squared norm of that gradient.
    """

    rows: dict[int, tuple[TrainedLayer, Tensor]]
    missed: float
    size: float


def _differentiated(
    policy: Policy, trial: Context, step: int, layers: Sequence[TrainedLayer], sample: int
) -> _Differentiated:
    rows: dict[int, tuple[TrainedLayer, Tensor]] = {}
    sums: dict[Tensor, Tensor] = {
        weight: torch.zeros_like(weight, dtype=torch.float32) for weight in trained_weights(layers)
    }
    expected: list[Tensor | None] = []

    def take(call: Call, grad: Tensor) -> None:
        rows[call.number] = call.layer, reached_rows(grad)
        for weight, gradient in weight_gradients(call.layer, call.inputs, grad).items():
            sums[weight] += gradient.sum(0)

    watch = Watch(layers, take)
    with watch.watching():
        differentiate(
            policy.runner,
            trial,
            step,
            lambda log_probs: expected.extend(watch.backward(log_probs[sample], list(sums))),
        )
    if not expected:
        raise ValueError(f"the pipeline ends before step {step}")
    missed = [own if grad is None else own - grad for own, grad in zip(sums.values(), expected, strict=True)]
    return _Differentiated(rows, _squared(missed), _squared([grad for grad in expected if grad is not None]))


def _squared(tensors: Sequence[Tensor]) -> float:
    return sum(each.float().square().sum().item() for each in tensors)


@contextmanager
def _shaken(weights: Sequence[torch.nn.Parameter]) -> Iterator[None]:
    """
    Perturb the weights while the context is open: LoRA starts with one factor at 0, which blocks the other's gradient.
    """
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
    Compute the gradient of the loss −mean(A · log π) over all samples and steps from the per-sample gradients.

    g = −Σ_i A_i Σ_t w_t ∇log π(a_it | s_it) / (N·T): eq. 6 of https://huggingface.co/papers/2305.13301, averaged as
    [`~ddpo_trl.update.objectives.score_function`] averages. The per-sample gradients are released.

    Args:
        batches (`Sequence[SampledBatch]`):
            Batches of a round on this process.
        advantages (`torch.Tensor` of shape `(N,)`):
            Advantages of all their samples.

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

"""Check if a pipeline can be trained, on a few steps; if not, one sentence names the reason and the remedy."""

import copy
import inspect
import itertools
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ddpo_trl.checks import log_prob_difference, replay_problem
from ddpo_trl.checks.gradients import no_gradient_cause
from ddpo_trl.checks.quantization import check_quantized_layers
from ddpo_trl.config import DDPOConfig
from ddpo_trl.policy.adapter_files import has_lora_loader
from ddpo_trl.policy.denoiser import adapter_layers, denoiser_name, remove_adapters
from ddpo_trl.policy.lora import describe_adapter
from ddpo_trl.policy.pipeline import plain_tensors
from ddpo_trl.policy.policy import Policy
from ddpo_trl.policy.records import Context, SampledBatch
from ddpo_trl.rollout.forecast import MemoryForecast, forecast_or_reason
from ddpo_trl.rollout.records import Transition


# Memory of GPUs, in GiB, and of it what CUDA itself takes: an assumption.
CARDS = (8, 12, 16, 24, 40, 80)
CUDA_GIB = 1

# Images may leave [0, 1] by rounding.
RANGE_TOLERANCE = 0.01


@dataclass(kw_only=True)
class PipelineReport:
    """
    Findings of [`check_pipeline`], up to the first problem.

    Args:
        pipeline (`str`):
            Class of the pipeline.
        denoiser (`str`):
            Network that is trained.
        scheduler (`str`):
            Scheduler of the pipeline, and the policy scheduler it becomes.
        adapter (`str`):
            LoRA weights and layers, and the method that loads them; empty with `use_lora=False`.
        stds (`list[float]`):
            σ_t of each step; 0 for deterministic ones, which are not trained on.
        image_shape (`tuple[int, ...]`):
            Shape of a sample, `(3, H, W)` or `(F, 3, H, W)`.
        replay_differences (`dict[int, float]`):
            Largest difference of log-probabilities between sampling and replay, in nats per latent dimension, for
            each step that can be trained on. It should be 0.
        trajectory_bytes (`int`):
            Memory of the recorded steps of one sample.
        training_bytes (`int`):
            Memory that the training step of one sample keeps for the backward pass.
        forecast ([`~ddpo_trl.rollout.forecast.MemoryForecast`], *optional*):
            Forecast of GPU memory. The report shows the largest batches that fit.
        notes (`list[str]`):
            Findings that don't prevent training.
        problem (`str`, *optional*):
            Reason why the pipeline can't be trained, with the remedy; `None` if it can.
    """

    pipeline: str
    denoiser: str = ""
    scheduler: str = ""
    adapter: str = ""
    stds: list[float] = field(default_factory=list)
    image_shape: tuple[int, ...] = ()
    replay_differences: dict[int, float] = field(default_factory=dict)
    trajectory_bytes: int = 0
    training_bytes: int = 0
    forecast: MemoryForecast | None = None
    notes: list[str] = field(default_factory=list)
    problem: str | None = None

    def __repr__(self) -> str:
        return "\n".join(f"{name:<20} {finding}" for name, finding in self.rows())

    def rows(self) -> list[tuple[str, str]]:
        """Return the report as `(name, finding)` lines, without those that were not reached."""
        differences = ", ".join(f"{step}: {value:.2g}" for step, value in self.replay_differences.items())
        rows = [
            ("pipeline", self.pipeline),
            ("denoiser", self.denoiser),
            ("scheduler", self.scheduler),
            ("LoRA", self.adapter),
            ("noise of each step", ", ".join(f"{std:.3g}" for std in self.stds)),
            ("sample", " x ".join(map(str, self.image_shape))),
            ("replay difference by step", differences),
            ("memory of a trajectory", per_sample(self.trajectory_bytes)),
            ("memory of a training step", per_sample(self.training_bytes)),
            *self._rows_of_forecast(),
            *(("note", note) for note in self.notes),
            ("verdict", self.problem or "can be trained"),
        ]
        return [(name, finding) for name, finding in rows if finding]

    def _rows_of_forecast(self) -> list[tuple[str, str]]:
        """Return the largest per-device batch for each size of a GPU."""
        if self.forecast is None:
            return []
        rows = []
        for one_pass, checkpointing in itertools.product((True, False), (False, True)):
            largest = [
                self.forecast.largest_batch((card - CUDA_GIB) * 2**30, one_pass, checkpointing) for card in CARDS
            ]
            fitting = [f"{card} GB: {size or 'none'}" for card, size in zip(CARDS, largest, strict=True)]
            passes = f"{'one pass' if one_pass else 'two passes'}{', checkpointing' if checkpointing else ''}"
            rows.append((f"forecast of the largest batch, {passes}", ", ".join(fitting)))
        return rows


def per_sample(size: int) -> str:
    """Return a number of bytes in words, empty if it is not known yet."""
    return f"{size / 2**20:.3g} MiB per sample" if size else ""


def check_pipeline(
    pipeline: DiffusionPipeline,
    config: DDPOConfig | None = None,
    prompts: Sequence[str] = ("a photo of a cat", "two dogs"),
    metadata: Sequence[Any] = ({}, {}),
) -> PipelineReport:
    """
    Check if a pipeline can be trained: sample, replay every step, compute one gradient.

    The pipeline is left unchanged. Its own adapter is used, or else the default one is added for the check.

    Example:

    ```python
    from ddpo_trl import check_pipeline, load_emoji_pipeline

    report = check_pipeline(load_emoji_pipeline())
    assert report.problem is None
    assert set(report.replay_differences.values()) == {0.0}
    ```

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            The pipeline, on the device on which it is checked.
        config ([`DDPOConfig`], *optional*):
            Settings; by default those of [`DDPOConfig`] with 4 steps.
        prompts (`Sequence[str]`, *optional*):
            Two prompts, preferably of different lengths.
        metadata (`Sequence`, *optional*):
            Metadata of the prompts, with the entries named in `config.pipeline_inputs`.

    Returns:
        [`PipelineReport`]: Its `problem` is `None` if the pipeline can be trained.
    """
    given = config or DDPOConfig(num_inference_steps=4)
    config = copy.copy(given)
    config.offload_text_encoders = config.offload_vae = False  # the pipeline stays where it is
    report = PipelineReport(pipeline=type(pipeline).__name__)
    try:
        with untouched(pipeline):
            policy, context = _examine(report, pipeline, config, prompts, metadata)
            forecast = forecast_or_reason(policy, context, given, alone=True)
        if isinstance(forecast, str):
            report.notes.append(f"no forecast of GPU memory: {forecast}")
        else:
            report.forecast = forecast
    except Exception as error:  # whatever a pipeline raises is the finding
        report.problem = finding(error, pipeline)
    return report


def finding(error: Exception, pipeline: DiffusionPipeline) -> str:
    """Return the sentence for an exception. Those of this package name their remedy, those of a pipeline do not."""
    frames = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    source = Path(inspect.getfile(type(pipeline)))
    if source in frames and not frames[-1].is_relative_to(Path(__file__).parents[1]):
        return (
            f"{type(error).__name__} in {type(pipeline).__name__}: {error}. This is the pipeline's own error. Call it "
            "yourself with the same arguments to see where, and give what it asks for in pipeline_kwargs or "
            "pipeline_inputs."
        )
    if isinstance(error, ValueError | RuntimeError):
        return str(error)
    return f"{type(error).__name__}: {error}"


def _examine(
    report: PipelineReport,
    pipeline: DiffusionPipeline,
    config: DDPOConfig,
    prompts: Sequence[str],
    metadata: Sequence[Any],
) -> tuple[Policy, Context]:
    name = denoiser_name(pipeline)
    denoiser = pipeline.components[name]
    weights = sum(parameter.numel() for parameter in denoiser.parameters())
    report.denoiser = f"{name}: {type(denoiser).__name__}, {weights:,} weights, {denoiser.dtype}"
    if isinstance(pipeline.components.get(f"{name}_2"), nn.Module):  # Wan 2.2
        report.notes.append(f"{name}_2 is not trained, only {name}")
    policy = Policy.from_pipeline(pipeline, config)
    if policy.adapter is not None:
        loader = "pipeline.load_lora_weights" if has_lora_loader(pipeline) else "peft.PeftModel.from_pretrained"
        report.adapter = f"{describe_adapter(denoiser, policy.adapter)}; loaded by {loader}"
    report.scheduler = f"{type(pipeline.scheduler).__name__} as {type(policy.scheduler).__name__}"
    context = policy.context(prompts, metadata, seeds=range(len(prompts)))
    report.stds = policy.probe_schedule(context).stds
    if policy.runner.calls.one_by_one_reason is not None:
        report.notes.append(f"one call of the pipeline per sample: {policy.runner.calls.one_by_one_reason}")
    if policy.runner.calls.without_effect:
        names = ", ".join(policy.runner.calls.without_effect)
        report.notes.append(f"with another value of {names} a sample is the same after one step")
    trained = config.steps_in_range(len(report.stds))
    batch = policy.sample(context, record=trained)
    check_quantized_layers(denoiser, name)
    _examine_samples(report, batch, trained)
    _examine_replay(report, policy, batch)
    _examine_gradients(report, policy, batch)
    return policy, context


def _examine_samples(report: PipelineReport, batch: SampledBatch, trained: range) -> None:
    images = batch.images
    report.image_shape = tuple(images.shape[1:])
    kept = [tensor for step in batch.steps.values() for tensor in (step.latents, step.next_latents, step.log_probs)]
    report.trajectory_bytes = storage_bytes(kept) // len(batch.context)
    if not batch.steps:
        raise ValueError(
            f"None of the {len(trained)} steps is stochastic, so there is nothing to train on. Raise "
            "num_inference_steps, or widen train_timestep_range."
        )
    if images.ndim not in (4, 5) or images.shape[-3] != 3 or len(images) != len(batch.context):
        raise ValueError(
            f"It returned a tensor of shape {tuple(images.shape)} for {len(batch.context)} prompts; rewards need "
            "(B, 3, H, W) or (B, F, 3, H, W)."
        )
    if not (images.min() >= -RANGE_TOLERANCE and images.max() <= 1 + RANGE_TOLERANCE):  # NaN too
        raise ValueError(
            f"Its images are between {images.min():.3g} and {images.max():.3g}; rewards need them finite and in "
            "[0, 1]. Look for half precision overflow in the decoder."
        )


def _examine_replay(report: PipelineReport, policy: Policy, batch: SampledBatch) -> None:
    for index, step in batch.steps.items():
        transition = Transition(
            step=index,
            **vars(step.to(policy.denoiser.device)),
            advantages=torch.zeros(len(batch.context)),
            context=batch.context,
            on_policy=True,
        )
        replayed, _ = policy(index, transition.latents, transition.next_latents, batch.context)
        difference = log_prob_difference(policy.settings, replayed, transition.log_probs, transition.latents)
        report.replay_differences[index] = difference
        if problem := replay_problem(policy, transition, replayed, [batch] * len(batch.context)):
            raise ValueError(problem)
        if not replayed.requires_grad:
            raise ValueError(
                no_gradient_cause(policy, index, transition.latents, transition.next_latents, batch.context)
            )


def _examine_gradients(report: PipelineReport, policy: Policy, batch: SampledBatch) -> None:
    index = min(batch.steps)
    step = batch.steps[index]
    with torch.enable_grad(), counted_activations(policy) as kept:
        log_probs, _ = policy(index, step.latents, step.next_latents, batch.context)
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(log_probs.sum(), trained, allow_unused=True)
    report.training_bytes = storage_bytes(kept) // len(batch.context)
    with_gradient = {
        id(parameter)
        for parameter, gradient in zip(trained, gradients, strict=True)
        if gradient is not None and gradient.any()
    }
    if not with_gradient:
        raise ValueError("Every gradient is zero: the denoiser's output does not depend on the trained weights.")
    layers = adapter_layers(policy.denoiser)
    dead = [layer for layer in layers if not any(id(parameter) in with_gradient for parameter in layer.parameters())]
    if dead:
        report.notes.append(f"{len(dead)} of the {len(layers)} LoRA layers get no gradient: their output is not used")


def storage_bytes(tensors: Sequence[Tensor]) -> int:
    """Return the memory of tensors; memory that several share counts once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


@contextmanager
def counted_activations(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the tensors that autograd keeps for the backward pass, except the weights of the module."""
    weights = {part.untyped_storage().data_ptr() for whole in module.parameters() for part in plain_tensors(whole)}
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.extend(part for part in plain_tensors(tensor) if part.untyped_storage().data_ptr() not in weights)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


@contextmanager
def untouched(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Restore the pipeline's networks at exit: remove a new adapter, restore frozen weights, dtypes and modes."""
    networks = [component for component in pipeline.components.values() if isinstance(component, nn.Module)]
    without_adapter = [network for network in networks if not adapter_layers(network)]
    weights = [
        (parameter, parameter.requires_grad, parameter.dtype)
        for network in networks
        for parameter in network.parameters()
    ]
    training = [(module, module.training) for network in networks for module in network.modules()]
    try:
        yield
    finally:
        for network in without_adapter:
            if adapter_layers(network):
                remove_adapters(network)
        for parameter, requires_grad, dtype in weights:
            parameter.requires_grad_(requires_grad)
            if parameter.dtype != dtype:  # an adapter's, which trains in float32
                parameter.data = parameter.data.to(dtype)
        for module, was_training in training:
            module.training = was_training

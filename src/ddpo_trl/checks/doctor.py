"""Check of a pipeline on a few steps: it can be a policy, or one sentence says why not."""

import copy
import inspect
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
from ddpo_trl.config import DDPOConfig
from ddpo_trl.policy.adapter_files import has_lora_loader
from ddpo_trl.policy.denoiser import adapter_layers, denoiser_name, remove_adapters
from ddpo_trl.policy.lora import add_adapter, describe_adapter
from ddpo_trl.policy.policy import Policy
from ddpo_trl.policy.records import SampledBatch
from ddpo_trl.rollout.records import Transition


# Images may leave [0, 1] by rounding.
RANGE_TOLERANCE = 0.01


@dataclass(kw_only=True)
class PipelineReport:
    """
    What [`check_pipeline`] found out, as far as it got.

    Args:
        pipeline (`str`):
            The pipeline's class.
        denoiser (`str`):
            The network that is trained.
        scheduler (`str`):
            The pipeline's scheduler and the policy scheduler it becomes.
        adapter (`str`):
            LoRA weights and layers, and who loads them.
        stds (`list[float]`):
            σ_t of each step; 0 for deterministic ones, which are not trained on.
        image_shape (`tuple[int, ...]`):
            Shape of a sample, `(3, H, W)` or `(F, 3, H, W)`.
        replay_differences (`dict[int, float]`):
            For each step that can be trained on, the largest difference of log-probabilities between sampling and
            replay, nats per latent dimension. 0 is as it should be.
        trajectory_bytes (`int`):
            Memory of one sample's recorded steps.
        training_bytes (`int`):
            Memory that one sample's training step keeps for the backward pass.
        notes (`list[str]`):
            What is worth knowing and no obstacle.
        problem (`str`, *optional*):
            Why the pipeline can't be a policy, and what can be done. `None` if it can.
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
    notes: list[str] = field(default_factory=list)
    problem: str | None = None

    def __repr__(self) -> str:
        return "\n".join(f"{what:<20} {found}" for what, found in self.rows())

    def rows(self) -> list[tuple[str, str]]:
        """The report as `(what, finding)` lines, without what was not reached."""
        differences = ", ".join(f"{step}: {value:.2g}" for step, value in self.replay_differences.items())
        rows = [
            ("pipeline", self.pipeline),
            ("denoiser", self.denoiser),
            ("scheduler", self.scheduler),
            ("LoRA", self.adapter),
            ("noise of each step", ", ".join(f"{std:.3g}" for std in self.stds)),
            ("a sample", " x ".join(map(str, self.image_shape))),
            ("replay difference by step", differences),
            ("memory of a trajectory", f"{self.trajectory_bytes / 2**20:.2f} MiB a sample" * bool(self.image_shape)),
            (
                "memory of a training step",
                f"{self.training_bytes / 2**20:.1f} MiB a sample" * bool(self.training_bytes),
            ),
            *(("note", note) for note in self.notes),
            ("verdict", self.problem or "can be trained"),
        ]
        return [(what, finding) for what, finding in rows if finding]


def check_pipeline(
    pipeline: DiffusionPipeline,
    config: DDPOConfig | None = None,
    prompts: Sequence[str] = ("a photo of a cat", "two dogs"),
    metadata: Sequence[Any] = ({}, {}),
) -> PipelineReport:
    """
    Tries a pipeline out as a policy: samples, replays every step, takes one gradient.

    The pipeline is left as it was. An adapter that it carries is used, else the default one is put on meanwhile.

    Example:

    ```python
    from ddpo_trl import check_pipeline, load_emoji_pipeline

    report = check_pipeline(load_emoji_pipeline())
    assert report.problem is None
    assert set(report.replay_differences.values()) == {0.0}
    ```

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            The pipeline, on the device it is to be tried on.
        config ([`DDPOConfig`], *optional*):
            How it is to be sampled; 4 steps by default.
        prompts (`Sequence[str]`, *optional*):
            Two prompts, of different length best.
        metadata (`Sequence`, *optional*):
            What comes with them, if `config.pipeline_inputs` names something.

    Returns:
        [`PipelineReport`], whose `problem` is `None` if the pipeline can be trained.
    """
    config = copy.copy(config or DDPOConfig(num_inference_steps=4))
    config.offload_text_encoders = config.offload_vae = False  # the pipeline stays where it is
    report = PipelineReport(pipeline=type(pipeline).__name__)
    try:
        with untouched(pipeline):
            _examine(report, pipeline, config, prompts, metadata)
    except Exception as error:  # any pipeline may come, and whatever it raises is the finding
        report.problem = finding(error, pipeline)
    return report


def finding(error: Exception, pipeline: DiffusionPipeline) -> str:
    """The sentence for an exception: what this package raises names its remedy, what a pipeline raises is its own."""
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
) -> None:
    name = denoiser_name(pipeline)
    denoiser = pipeline.components[name]
    weights = sum(parameter.numel() for parameter in denoiser.parameters())
    report.denoiser = f"{name}: {type(denoiser).__name__}, {weights:,} weights, {denoiser.dtype}"
    if isinstance(pipeline.components.get(f"{name}_2"), nn.Module):  # Wan 2.2
        report.notes.append(f"{name}_2 is used as it is; only {name} is trained")
    adapter = add_adapter(pipeline, None)
    loader = "pipeline.load_lora_weights" if has_lora_loader(pipeline) else "peft.PeftModel.from_pretrained"
    report.adapter = f"{describe_adapter(denoiser, adapter)}; loaded by {loader}"
    policy = Policy(pipeline, config, adapter)
    report.scheduler = f"{type(pipeline.scheduler).__name__} as {type(policy.scheduler).__name__}"
    context = policy.context(prompts, metadata, seeds=range(len(prompts)))
    report.stds = policy.probe_schedule(context).stds
    if policy.calls.one_by_one_reason is not None:
        report.notes.append(f"one call of the pipeline per sample: {policy.calls.one_by_one_reason}")
    if policy.calls.without_effect:
        names = ", ".join(policy.calls.without_effect)
        report.notes.append(f"with another {names} a sample is the same after one step")
    trained = config.steps_in_range(len(report.stds))
    batch = policy.sample(context, record=trained)
    _examine_samples(report, batch, trained)
    if report.problem is None:
        _examine_replay(report, policy, batch)
    if report.problem is None:
        _examine_gradients(report, policy, batch)


def _examine_samples(report: PipelineReport, batch: SampledBatch, trained: range) -> None:
    images = batch.images
    report.image_shape = tuple(images.shape[1:])
    kept = [tensor for step in batch.steps.values() for tensor in (step.latents, step.next_latents, step.log_probs)]
    report.trajectory_bytes = storage_bytes(kept) // len(batch.context)
    if not batch.steps:
        report.problem = (
            f"None of the {len(trained)} steps is stochastic, so there is nothing to train on. Raise "
            "num_inference_steps, or widen train_timestep_range."
        )
    elif images.ndim not in (4, 5) or images.shape[-3] != 3 or len(images) != len(batch.context):
        report.problem = (
            f"It returned a tensor of shape {tuple(images.shape)} for {len(batch.context)} prompts; rewards need "
            "(B, 3, H, W) or (B, F, 3, H, W)."
        )
    elif not (images.min() >= -RANGE_TOLERANCE and images.max() <= 1 + RANGE_TOLERANCE):  # NaN too
        report.problem = (
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
        if report.problem is None:
            report.problem = replay_problem(policy, transition, replayed, [batch] * len(batch.context))
        if report.problem is None and not replayed.requires_grad:
            report.problem = no_gradient_cause(
                policy, index, transition.latents, transition.next_latents, batch.context
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
    layers = adapter_layers(policy.denoiser)
    dead = [layer for layer in layers if not any(id(parameter) in with_gradient for parameter in layer.parameters())]
    if len(dead) == len(layers):
        report.problem = "The gradient of every LoRA layer is zero: the denoiser's output does not depend on them."
    elif dead:
        report.notes.append(
            f"{len(dead)} of the {len(layers)} LoRA layers get no gradient: what they compute is dropped"
        )


def storage_bytes(tensors: Sequence[Tensor]) -> int:
    """Memory of tensors, those that share it counted once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


@contextmanager
def counted_activations(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collects what autograd keeps for the backward pass, except for the module's own weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept.append(tensor)
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
            parameter.data = parameter.data.to(dtype)  # an adapter's, which trains in float32
        for module, was_training in training:
            module.training = was_training

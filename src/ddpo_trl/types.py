"""The records that flow through a round: sampled batch → rollout → transition → objective.

Shape legend, used in every docstring of the package: `B` samples of a batch, `N` samples of a round on one process,
`...` the latent dimensions of one sample (`C, H, W` for Stable Diffusion).
"""

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Context:
    """
    What a batch of samples is made from: c of the Markov decision process, and the seeds.

    Args:
        prompts (`Sequence[str]` of length `B`):
            The prompt of each sample.
        seeds (`Sequence[int]` of length `B`):
            All randomness of each sample.
        inputs (`Mapping[str, Sequence]`, *optional*):
            Further per-sample arguments of the pipeline, by name: `{"image": [...]}` for image-to-image.
    """

    prompts: Sequence[str]
    seeds: Sequence[int]
    inputs: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompts)

    def rows(self, rows: Sequence[int]) -> "Context":
        """The samples with these indices, in this order."""
        return Context(
            prompts=[self.prompts[row] for row in rows],
            seeds=[self.seeds[row] for row in rows],
            inputs={name: [values[row] for row in rows] for name, values in self.inputs.items()},
        )

    def singles(self) -> list["Context"]:
        """Each sample as a context of its own."""
        return [self.rows([row]) for row in range(len(self))]


@dataclass(frozen=True, kw_only=True)
class Step:
    """
    One recorded denoising step of a batch: a transition of the Markov decision process.

    Args:
        latents (`torch.Tensor` of shape `(B, ...)`):
            State x_t, in the pipeline's dtype.
        next_latents (`torch.Tensor` of shape `(B, ...)`):
            Action x_{t-1}, rounded to the pipeline's dtype *before* its log-probability was taken.
        log_probs (`torch.Tensor` of shape `(B,)`):
            log π_old(x_{t-1} | x_t) in nats, float32, reduced over the latent dimensions by the configured reduction.
    """

    latents: Tensor
    next_latents: Tensor
    log_probs: Tensor

    def to(self, device: torch.device | str) -> "Step":
        """The same step on another device."""
        return Step(**{name: tensor.to(device) for name, tensor in vars(self).items()})


def steps_to(steps: Mapping[int, Step], device: torch.device | str) -> dict[int, Step]:
    """
    Recorded steps on another device. The action of one step is the state of the next, one tensor, and stays one.

    Args:
        steps (`Mapping[int, Step]`):
            By the index of the step.
        device (`torch.device` or `str`):
            Where to.
    """
    moved: dict[int, Tensor] = {}

    def move(tensor: Tensor) -> Tensor:
        if id(tensor) not in moved:
            moved[id(tensor)] = tensor.to(device)
        return moved[id(tensor)]

    return {
        index: Step(**{name: move(tensor) for name, tensor in vars(step).items()}) for index, step in steps.items()
    }


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """
    Under which conditions a batch was sampled. They are looked at if a replay turns out to be another policy.

    Args:
        autocast (`torch.dtype`, *optional*):
            The dtype of autocast, `None` if it was off.
        settings (`Mapping[str, Mapping]`):
            The sampler's settings by owner and name.
        denoiser_dtype (`torch.dtype`):
            In which the denoiser was.
        adapter (`tuple`):
            How each adapter layer was switched.
        weights (`Mapping[str, torch.Tensor]`):
            The sum of each trained parameter.
        embeddings (`tuple[torch.Tensor, ...]`):
            Weighted sums over the prompt embeddings; empty if the pipeline's are not known.
        stochastic (`Collection[int]`, *optional*):
            Indices of the steps that got noise, `None` for all.
    """

    autocast: torch.dtype | None
    settings: Mapping[str, Mapping[str, Any]]
    denoiser_dtype: torch.dtype
    adapter: tuple[Any, ...]
    weights: Mapping[str, Tensor]
    embeddings: tuple[Tensor, ...]
    stochastic: Collection[int] | None


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """
    What one pass keeps of a batch in place of its transitions.

    Args:
        log_probs (`torch.Tensor` of shape `(B, T)`):
            log π_θ of the T trained steps of each sample.
        weights (`list[torch.Tensor]`):
            For each trained parameter a tensor of shape `(B, *parameter.shape)`, float32: the gradient of the weighted
            sum of a sample's log-probabilities. It is emptied when the gradients have been used.
    """

    log_probs: Tensor
    weights: list[Tensor]


@dataclass(frozen=True, kw_only=True)
class SampledBatch:
    """
    The trajectories of the samples that were drawn at once.

    Args:
        context ([`Context`] of length `B`):
            What they were made from.
        images (`torch.Tensor` of shape `(B, 3, H, W)`, or `(B, F, 3, H, W)` for video):
            What the pipeline made, float32 in [0, 1]; in a rollout, on the CPU.
        steps (`Mapping[int, Step]`):
            The recorded transitions, by the index of their step in the sampler's schedule (0 is the noisiest).
        conditions ([`Conditions`], *optional*):
            Under which they were sampled.
        gradients ([`Gradients`], *optional*):
            In one pass only; `steps` is empty then.
        finite_steps (`torch.Tensor` of shape `(B,)`, *optional*), steps_run (`int`):
            Number of denoising steps after which the latents of each sample were finite, and of all that were run.
    """

    context: Context
    images: Tensor
    steps: Mapping[int, Step]
    conditions: Conditions | None = None
    gradients: Gradients | None = None
    finite_steps: Tensor | None = None
    steps_run: int = 0

    @classmethod
    def joined(cls, context: Context, parts: Sequence["SampledBatch"]) -> "SampledBatch":
        """
        Join the samples of several calls of the pipeline to one batch.

        Args:
            context ([`Context`] of length `B`):
                What all of them were made from.
            parts (`Sequence[SampledBatch]`):
                Their batches, in order.

        Raises:
            `ValueError`: If the samples have different sizes or numbers of steps.
        """
        if len(parts) == 1:
            return parts[0]
        if len(counts := {part.steps_run for part in parts}) > 1:
            raise ValueError(
                f"The samples of a batch take different numbers of steps, {' and '.join(map(str, sorted(counts)))}: "
                f"{', '.join(context.inputs)} changes the schedule. Give one value for all in pipeline_kwargs."
            )
        gradients = [part.gradients for part in parts if part.gradients is not None]
        finite_steps = [part.finite_steps for part in parts if part.finite_steps is not None]
        return cls(
            context=context,
            images=join_samples([part.images for part in parts]),
            steps={
                index: Step(
                    **{
                        name: join_samples([vars(part.steps[index])[name] for part in parts])
                        for name in vars(parts[0].steps[index])
                    }
                )
                for index in parts[0].steps
            },
            conditions=parts[-1].conditions,
            gradients=Gradients(
                log_probs=torch.cat([each.log_probs for each in gradients]),
                weights=[torch.cat(each) for each in zip(*(each.weights for each in gradients), strict=True)],
            )
            if gradients
            else None,
            finite_steps=torch.cat(finite_steps) if finite_steps else None,
            steps_run=parts[0].steps_run,
        )


def join_samples(parts: Sequence[Tensor]) -> Tensor:
    """
    Join the samples of several calls to one tensor.

    Raises:
        `ValueError`: If they have different sizes.
    """
    if len(sizes := {tuple(part.shape[1:]) for part in parts}) > 1:
        raise ValueError(
            f"The samples of a batch have different sizes, {' and '.join(map(str, sorted(sizes)))}: give the pipeline "
            "inputs of one size, or set height and width in pipeline_kwargs."
        )
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]


@dataclass(frozen=True, kw_only=True)
class Transition:
    """
    A micro-batch: B samples at *one* step, since pipelines loop over a scalar timestep.

    It crosses `transformers.Trainer` as the plain dict `vars(transition)`, because the Trainer rebuilds its batches
    with `type(batch)(...)` and looks for a `"labels"` key in them.

    Args:
        step (`int`):
            Index of the step in the sampler's schedule.
        latents (`torch.Tensor` of shape `(B, ...)`):
            State x_t.
        next_latents (`torch.Tensor` of shape `(B, ...)`):
            Action x_{t-1}.
        log_probs (`torch.Tensor` of shape `(B,)`):
            log π_old of the action.
        advantages (`torch.Tensor` of shape `(B,)`):
            Advantage of the sample that the transition belongs to, in units of reward standard deviations.
        context ([`Context`] of length `B`):
            What the samples were made from.
        on_policy (`bool`):
            Whether no update has happened since the rollout was sampled.
        samples (`Sequence[int]` of length `B`, *optional*):
            Index of each sample in its rollout.
        valid (`Sequence[int]`, *optional*):
            Rows with a valid reward; `None` if all have one. The others take no part in any sum.
    """

    step: int
    latents: Tensor
    next_latents: Tensor
    log_probs: Tensor
    advantages: Tensor
    context: Context
    on_policy: bool
    samples: Sequence[int] = ()
    valid: Sequence[int] | None = None

    @property
    def share_counted(self) -> float:
        """Share of the rows that have a valid reward."""
        return 1.0 if self.valid is None else len(self.valid) / len(self.context)

    def counted(self, values: Tensor) -> Tensor:
        """
        Return those of `(B,)` values that belong to valid rewards; all if there are none, which then count 0 times.
        """
        return values[list(self.valid)] if self.valid else values


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """
    The samples of one round on one process, with what their rewards say about them.

    Args:
        round (`int`):
            Index of the round, from 0.
        batches (`Sequence[SampledBatch]`):
            The sampled batches, all of the same size; sample i is row `i % B` of batch `i // B`.
        rewards (`torch.Tensor` of shape `(N,)`):
            Weighted sum of the reward functions, float64; NaN where it is not valid.
        scores (`torch.Tensor` of shape `(N, F)`):
            A column per reward function, float64 on the CPU; NaN where one is not valid.
        advantages (`torch.Tensor` of shape `(N,)`):
            Normalised rewards, float32; 0 where the reward is not valid.
        metrics (`dict[str, float]`):
            Statistics over the samples of all processes.
    """

    round: int
    batches: Sequence[SampledBatch]
    rewards: Tensor
    scores: Tensor
    advantages: Tensor
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def prompts(self) -> list[str]:
        return [prompt for batch in self.batches for prompt in batch.context.prompts]

    @property
    def images(self) -> Tensor:
        return torch.cat([batch.images for batch in self.batches])

    @property
    def log_probs(self) -> Tensor:
        """In one pass, log π_θ of all samples and trained steps: `(N, T)`."""
        return torch.cat([batch.gradients.log_probs for batch in self.batches if batch.gradients is not None])

    @functools.cached_property
    def valid(self) -> list[int]:
        """Indices of the samples that have a valid reward."""
        return (~self.rewards.isnan()).nonzero().flatten().tolist()

    def origin(self, sample: int) -> SampledBatch:
        """The batch in which a sample was drawn."""
        return self.batches[sample // len(self.batches[0].context)]

    def transition(self, samples: Sequence[int], step: int, on_policy: bool) -> Transition:
        """
        Collect step `step` of the samples with the given indices into one micro-batch, on the advantages' device.

        A sample without a valid reward may hold NaN, and 0 · NaN is NaN. A valid sample is run instead, so that the
        size of the micro-batch stays; or zeros, if this process has no valid one. `valid` says which rows count.
        """
        device = self.advantages.device
        valid = None
        if len(self.valid) < len(self.rewards):
            valid = [row for row, sample in enumerate(samples) if sample in self.valid]
            samples = [sample if sample in self.valid else [*self.valid, sample][0] for sample in samples]

        def batched(rows: Sequence[Tensor]) -> Tensor:
            values = torch.stack(list(rows)).to(device)
            return values if self.valid else torch.zeros_like(values)

        places = [divmod(sample, len(self.batches[0].context)) for sample in samples]
        recorded = [(self.batches[batch].steps[step], row) for batch, row in places]
        contexts = [(self.batches[batch].context, row) for batch, row in places]
        return Transition(
            step=step,
            latents=batched([step.latents[row] for step, row in recorded]),
            next_latents=batched([step.next_latents[row] for step, row in recorded]),
            log_probs=batched([step.log_probs[row] for step, row in recorded]),
            advantages=self.advantages[list(samples)],
            context=Context(
                prompts=[context.prompts[row] for context, row in contexts],
                seeds=[context.seeds[row] for context, row in contexts],
                inputs={
                    name: [context.inputs[name][row] for context, row in contexts]
                    for name in self.batches[0].context.inputs
                },
            ),
            on_policy=on_policy,
            samples=samples,
            valid=valid,
        )


@dataclass(frozen=True, kw_only=True)
class Objective:
    """
    What an objective returns: the scalar to minimise and detached statistics to log.

    Args:
        loss (`torch.Tensor` of shape `()`):
            Mean over the micro-batch.
        metrics (`dict[str, torch.Tensor]`):
            Scalars without gradient, named as they are logged.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


def own_copy(value: Any) -> Any:
    """A copy of dicts and lists, of tensors and arrays, and of such in tuples. Other objects stay the same."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, np.ndarray | Image.Image):
        return value.copy()
    if type(value) is dict:
        return {key: own_copy(entry) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(own_copy, value))
    return value


class RewardFunction(Protocol):
    """
    Any callable that scores a batch of images. It may be an `async def`, and it runs in a worker thread.

    Args:
        images (`torch.Tensor` of shape `(B, 3, H, W)`, or `(B, F, 3, H, W)` for video):
            Float32 in [0, 1], on the sampling device.
        prompts (`tuple[str, ...]` of length `B`):
            The prompts.
        metadata (`tuple[Any, ...]` of length `B`):
            What `prompt_fn` returned beside each prompt; a dataset's other columns as a dict.

    Returns:
        B numbers as list, array or tensor (any device, integers too), or a pair `(rewards, info)` as reward functions
        written for TRL ≤ 0.23 and ddpo-pytorch return; `info` is ignored.
    """

    def __call__(self, images: Tensor, prompts: tuple[str, ...], metadata: tuple[Any, ...], /) -> Any: ...

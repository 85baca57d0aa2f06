"""The records that flow through a round: sampled batch → rollout → transition → objective.

Shape legend, used in every docstring of the package: `B` samples of a batch, `N` samples of a round on one process,
`...` the latent dimensions of one sample (`C, H, W` for Stable Diffusion).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
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


@dataclass(frozen=True, kw_only=True)
class SampledBatch:
    """
    The trajectories of the samples that were drawn at once.

    Args:
        context ([`Context`] of length `B`):
            What they were made from.
        images (`torch.Tensor` of shape `(B, 3, H, W)`, or `(B, F, 3, H, W)` for video):
            What the pipeline made, float32 in [0, 1].
        steps (`Mapping[int, Step]`):
            The recorded transitions, by the index of their step in the sampler's schedule (0 is the noisiest).
    """

    context: Context
    images: Tensor
    steps: Mapping[int, Step]


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
    """

    step: int
    latents: Tensor
    next_latents: Tensor
    log_probs: Tensor
    advantages: Tensor
    context: Context
    on_policy: bool


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
            Weighted sum of the reward functions, float64.
        advantages (`torch.Tensor` of shape `(N,)`):
            Normalised rewards, float32.
        metrics (`dict[str, float]`):
            Statistics over the samples of all processes.
    """

    round: int
    batches: Sequence[SampledBatch]
    rewards: Tensor
    advantages: Tensor
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def prompts(self) -> list[str]:
        return [prompt for batch in self.batches for prompt in batch.context.prompts]

    @property
    def images(self) -> Tensor:
        return torch.cat([batch.images for batch in self.batches])

    def transition(self, samples: Sequence[int], step: int, on_policy: bool) -> Transition:
        """Collects step `step` of the samples with the given indices into one micro-batch."""
        places = [divmod(sample, len(self.batches[0].context)) for sample in samples]
        recorded = [(self.batches[batch].steps[step], row) for batch, row in places]
        contexts = [(self.batches[batch].context, row) for batch, row in places]
        return Transition(
            step=step,
            latents=torch.stack([step.latents[row] for step, row in recorded]),
            next_latents=torch.stack([step.next_latents[row] for step, row in recorded]),
            log_probs=torch.stack([step.log_probs[row] for step, row in recorded]),
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

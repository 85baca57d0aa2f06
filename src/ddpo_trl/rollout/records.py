"""Records of a round: rollout → transition."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

from ddpo_trl.policy.records import Context, SampledBatch
from ddpo_trl.transfers import to_device


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
        """Return the `(B,)` values of the valid rows; all of them if no row is valid."""
        return torch.stack([values[row] for row in self.valid]) if self.valid else values


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """
    Samples of one round on one process, with their rewards and advantages.

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
            Normalized rewards, float32; 0 where the reward is not valid.
        metrics (`dict[str, float]`):
            Statistics over the samples of all processes.
    """

    round: int
    batches: Sequence[SampledBatch]
    rewards: Tensor
    scores: Tensor
    advantages: Tensor
    metrics: dict[str, float] = field(default_factory=dict)

    @functools.cached_property
    def context(self) -> Context:
        """Prompts, seeds and inputs of all samples."""
        contexts = [batch.context for batch in self.batches]
        return Context(
            prompts=list(chain.from_iterable(each.prompts for each in contexts)),
            seeds=list(chain.from_iterable(each.seeds for each in contexts)),
            inputs={
                name: list(chain.from_iterable(each.inputs[name] for each in contexts)) for name in contexts[0].inputs
            },
        )

    @property
    def prompts(self) -> list[str]:
        return list(self.context.prompts)

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
        """Return the batch in which a sample was drawn."""
        return self.batches[sample // len(self.batches[0].context)]

    def transition(self, samples: Sequence[int], step: int, on_policy: bool) -> Transition:
        """
        Collect step `step` of the samples with the given indices into one micro-batch, on the advantages' device.

        A sample without a valid reward may hold NaN, and 0 · NaN is NaN. A valid sample is run instead, so that the
        size of the micro-batch stays; or zeros, if this process has no valid one. `Transition.valid` lists the rows
        that count.
        """
        device = self.advantages.device
        valid = None
        if len(self.valid) < len(self.rewards):
            valid = [row for row, sample in enumerate(samples) if sample in self.valid]
            samples = [sample if sample in self.valid else [*self.valid, sample][0] for sample in samples]

        def batched(rows: Sequence[Tensor]) -> Tensor:
            values = to_device(torch.stack(list(rows)), device)
            return values if self.valid else torch.zeros_like(values)

        size = len(self.batches[0].context)
        recorded = [(self.origin(sample).steps[step], sample % size) for sample in samples]
        return Transition(
            step=step,
            latents=batched([step.latents[row] for step, row in recorded]),
            next_latents=batched([step.next_latents[row] for step, row in recorded]),
            log_probs=batched([step.log_probs[row] for step, row in recorded]),
            advantages=torch.stack([self.advantages[sample] for sample in samples]),
            context=self.context.rows(samples),
            on_policy=on_policy,
            samples=samples,
            valid=valid,
        )

"""Records of sampling: context → step → sampled batch.

Shape legend, used in every docstring of the package: `B` samples of a batch, `N` samples of a round on one process,
`...` the latent dimensions of one sample (`C, H, W` for Stable Diffusion).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ddpo_trl.policy.fingerprint import Fingerprint


@dataclass(frozen=True, kw_only=True)
class Context:
    """
    Conditioning of a batch of samples, c of the Markov decision process, and the seeds.

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
        """Return the samples with these indices, in this order."""
        return Context(
            prompts=[self.prompts[row] for row in rows],
            seeds=[self.seeds[row] for row in rows],
            inputs={name: [values[row] for row in rows] for name, values in self.inputs.items()},
        )

    def split(self, size: int) -> list["Context"]:
        """Return contexts of at most `size` samples each, in order."""
        rows = range(len(self))
        return [self.rows(rows[first : first + size]) for first in rows[::size]]

    def singles(self) -> list["Context"]:
        """Return each sample as a context of its own."""
        return self.split(1)


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
        """Return the step on another device."""
        return Step(**{name: tensor.to(device) for name, tensor in vars(self).items()})


def steps_to(steps: Mapping[int, Step], device: torch.device | str) -> dict[int, Step]:
    """Move recorded steps to a device. The action of one step is the state of the next, one tensor, and stays one."""
    moved: dict[int, Tensor] = {}

    def move(tensor: Tensor) -> Tensor:
        if id(tensor) not in moved:
            moved[id(tensor)] = tensor.to(device)
        return moved[id(tensor)]

    return {
        index: Step(**{name: move(tensor) for name, tensor in vars(step).items()}) for index, step in steps.items()
    }


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """
    Per-sample gradients of a batch, kept in one pass instead of its transitions.

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
    Trajectories of the samples that were drawn at once.

    Args:
        context ([`Context`] of length `B`):
            Prompts, seeds and inputs of the samples.
        images (`torch.Tensor` of shape `(B, 3, H, W)`, or `(B, F, 3, H, W)` for video):
            Output of the pipeline, float32 in [0, 1]; in a rollout, on the CPU.
        steps (`Mapping[int, Step]`):
            The recorded transitions, by the index of their step in the sampler's schedule (0 is the noisiest).
        fingerprint ([`Fingerprint`], *optional*):
            Settings, weights and embeddings under which they were sampled.
        gradients ([`Gradients`], *optional*):
            In one pass only; `steps` is empty then.
        finite_steps (`torch.Tensor` of shape `(B,)`, *optional*), steps_run (`int`):
            Number of denoising steps after which the latents of each sample were finite, and of all that were run.
    """

    context: Context
    images: Tensor
    steps: Mapping[int, Step]
    fingerprint: Fingerprint | None = None
    gradients: Gradients | None = None
    finite_steps: Tensor | None = None
    steps_run: int = 0

    @classmethod
    def joined(cls, context: Context, parts: Sequence["SampledBatch"]) -> "SampledBatch":
        """
        Join the samples of several calls of the pipeline, in order, to one batch.

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
            fingerprint=parts[-1].fingerprint,
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
    """Join the samples of several calls to one tensor. Raise a `ValueError` if they have different sizes."""
    if len(sizes := {tuple(part.shape[1:]) for part in parts}) > 1:
        raise ValueError(
            f"The samples of a batch have different sizes, {' and '.join(map(str, sorted(sizes)))}: give the pipeline "
            "inputs of one size, or set height and width in pipeline_kwargs."
        )
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]

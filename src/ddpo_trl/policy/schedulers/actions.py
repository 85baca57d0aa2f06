"""Sources of a policy scheduler's actions: drawn from the policy, or recorded ones replayed."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import Any, NoReturn

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ddpo_trl.finite import finite_rows
from ddpo_trl.policy.gaussian import Reduction, log_prob
from ddpo_trl.policy.records import Step
from ddpo_trl.policy.schedulers.layout import StateLayout
from ddpo_trl.transfers import to_device


class StepReplayed(Exception):
    """Exit from a pipeline's `__call__` after the one step that was wanted."""


class NoGradient(RuntimeError):
    """The differentiated output does not depend on the trained weights."""


class ActionSource(ABC):
    """Source of the action x_{t-1} of each step. Steps are counted from the first that the pipeline runs."""

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        """Raise a `ValueError`: pipelines copy their scheduler to denoise another trajectory with it."""
        raise ValueError(
            "The pipeline copies its scheduler within its __call__, to denoise a second trajectory with it (the audio "
            "of a video, the views of a panorama). A policy has one trajectory: what the copy steps would be neither "
            "recorded nor replayed. Use a pipeline of the same model that steps a single trajectory."
        )

    def begin(self) -> None:  # noqa: B027 (optional)
        """Called when the pipeline starts a schedule."""

    @abstractmethod
    def schedule(self, timesteps: Tensor, skipped: int) -> Tensor:
        """
        Return the timesteps that the pipeline runs, given the full schedule `(T,)` and the number of steps that the
        pipeline skips at the start (image-to-image with a strength below 1).
        """

    def first_latents(self, prepared: Tensor, layout: StateLayout) -> Tensor:
        """Return the first latents of the pipeline, given those that its `prepare_latents` returned."""
        return prepared

    @property
    def batch_size(self) -> int | None:
        """Number of samples, `None` if it is that of the latents' rows."""
        return None

    @abstractmethod
    def index(self, visits: int) -> int:
        """Return the index of the step that the pipeline runs after `visits` others."""

    @abstractmethod
    def is_stochastic(self, index: int) -> bool:
        """Return whether step `index` gets noise."""

    @abstractmethod
    def next_latents(self, index: int, latents: Tensor, mean: Tensor, std: float) -> Tensor:
        """
        Return the action of step `index` in state `latents`, `(B, ...)` in their dtype, under N(mean, std² I); `std`
        is 0 on a deterministic step.

        Raises:
            [`StepReplayed`]: If no further step is wanted.
        """


class Sampling(ActionSource):
    """
    Draw every action from the policy and record the steps in `record`.

    Args:
        generators (`Sequence[torch.Generator]` of length `B`):
            One per sample, so that a sample's noise does not depend on the batch it is in.
        record (`Collection[int]`):
            Indices of the steps to keep; deterministic ones have no density and are never kept.
        reduction (`"mean"` or `"sum"`):
            Reduction of the log-probabilities over the latent dimensions.
        stochastic (`Collection[int]`, *optional*):
            Indices of the steps that get noise, all by default: the SDE window.
        max_steps (`int`, *optional*):
            Number of steps to run, all by default.

    Attributes:
        steps (`dict[int, Step]`):
            Recorded steps, by index.
        steps_run (`int`):
            Number of steps that were run.
        finite_steps (`torch.Tensor` of shape `(B,)`, *optional*):
            Number of steps after which the latents of each sample were finite; `None` before the first step. Counted
            on the device, so that nothing waits for it.
    """

    def __init__(
        self,
        generators: Sequence[torch.Generator],
        record: Collection[int],
        reduction: Reduction,
        stochastic: Collection[int] | None = None,
        max_steps: int | None = None,
    ):
        self.generators = list(generators)
        self.record = record
        self.reduction = reduction
        self.stochastic = stochastic
        self.max_steps = max_steps
        self.steps: dict[int, Step] = {}
        self.steps_run = 0
        self.finite_steps: Tensor | None = None

    def begin(self) -> None:
        if self.steps_run:
            raise ValueError(
                f"The pipeline starts another schedule in the same __call__, after {self.steps_run} steps (a video in "
                "several sections, or in stages). A policy has one trajectory, whose steps are trained on by their "
                "index. Have it run once: give it fewer frames, or switch further stages off in pipeline_kwargs."
            )

    def schedule(self, timesteps: Tensor, skipped: int) -> Tensor:
        return timesteps if self.max_steps is None else timesteps[: skipped + self.max_steps]

    @property
    def batch_size(self) -> int | None:
        return len(self.generators) or None

    def index(self, visits: int) -> int:
        return visits

    def is_stochastic(self, index: int) -> bool:
        return self.stochastic is None or index in self.stochastic

    def draw(self, latents: Tensor, mean: Tensor, std: float) -> Tensor:
        """Draw an action of N(mean, std² I), in the dtype of `latents`."""
        action = mean
        if std > 0:
            # Drawn while the device is still busy with the network, the same numbers on every device.
            noise = randn_tensor(mean.shape, generator=self.generators, device=torch.device("cpu"))
            action = mean + std * to_device(noise, mean.device)
        # Rounded before the density is taken: in bf16 the rounding alone moves a log-probability by more than ε.
        action = action.to(latents.dtype)
        self._count_finite(action)
        return action

    def _count_finite(self, action: Tensor) -> None:
        finite = finite_rows(action)
        before = torch.zeros_like(finite, dtype=torch.long) if self.finite_steps is None else self.finite_steps
        self.finite_steps = before + (finite & (before == self.steps_run))
        self.steps_run += 1

    def next_latents(self, index: int, latents: Tensor, mean: Tensor, std: float) -> Tensor:
        action = self.draw(latents, mean, std)
        if std > 0 and index in self.record:
            log_probs = log_prob(action, mean, std, self.reduction)
            self.steps[index] = Step(latents=latents, next_latents=action, log_probs=log_probs)
        return action


class DifferentiatedSampling(Sampling):
    """
    Draw as [`Sampling`] does, and pass on the log-probabilities of the steps in `record` with their graph.

    Grad mode is on while the network runs for such a step, and off otherwise.

    Args:
        on_log_probs (`Callable[[int, torch.Tensor], None]`):
            Called within each recorded step with its index and its log-probabilities, `(B,)`. The graph is released
            afterwards.
        **kwargs:
            Arguments of [`Sampling`].

    Attributes:
        log_probs (`dict[int, torch.Tensor]`):
            Log-probabilities of the recorded steps that were run, by index: `(B,)` each, without graph.
    """

    def __init__(self, on_log_probs: Callable[[int, Tensor], None], **kwargs: Any):
        super().__init__(**kwargs)
        self.on_log_probs = on_log_probs
        self.log_probs: dict[int, Tensor] = {}

    def schedule(self, timesteps: Tensor, skipped: int) -> Tensor:
        set_gradients(0 in self.record)  # until the next step; whoever called the pipeline sets it back
        return super().schedule(timesteps, skipped)

    def next_latents(self, index: int, latents: Tensor, mean: Tensor, std: float) -> Tensor:
        action = self.draw(latents, mean.detach(), std)
        if std > 0 and index in self.record:
            log_probs = log_prob(action, mean, std, self.reduction)
            if not log_probs.requires_grad:
                raise NoGradient(
                    f"No gradient reaches the trained network at step {index}: the pipeline may run another one there "
                    "(leave such steps out with train_timestep_range), or this one without gradients, or its adapter "
                    "is fused or switched off. `ddpo-trl doctor` reports which."
                )
            self.on_log_probs(index, log_probs)
            self.log_probs[index] = log_probs.detach()
        set_gradients(index + 1 in self.record)
        return action


def set_gradients(enabled: bool) -> None:
    """Set grad mode. Before it goes on, forget autocast's copies of weights: torch 2.6 made them without gradients."""
    if enabled and not torch.is_grad_enabled():
        torch.clear_autocast_cache()
    torch.set_grad_enabled(enabled)


class Replay(ActionSource):
    """
    Makes the pipeline run one step from a given state, keeps the policy's distribution over its action, and leaves.

    Args:
        step (`int`):
            Index of the step.
        state (`torch.Tensor` of shape `(B, ...)`, *optional*):
            Recorded x_t; the pipeline's own first latents by default.

    Attributes:
        prepared (`torch.Tensor`):
            Latents that the pipeline prepared.
        latents (`torch.Tensor` of shape `(B, ...)`, *optional*):
            State x_t with which the step was run; `None` if it was not.
        mean (`torch.Tensor` of shape `(B, ...)`):
            μ_θ(x_t), float32, with gradient if grad mode is on.
        std (`float`):
            σ_t.
    """

    def __init__(self, step: int, state: Tensor | None = None):
        self.step = step
        self.state = state
        self.prepared: Tensor
        self.latents: Tensor | None = None
        self.mean: Tensor
        self.std: float

    def schedule(self, timesteps: Tensor, skipped: int) -> Tensor:
        # As many as ever, because some pipelines count them; only the first one that is not skipped is going to be
        # run, wherever that is: pipelines may slice the schedule and not say so.
        return timesteps.roll(-self.step)

    def first_latents(self, prepared: Tensor, layout: StateLayout) -> Tensor:
        self.prepared = prepared
        return prepared if self.state is None else layout.put(prepared, self.state)

    @property
    def batch_size(self) -> int | None:
        return None if self.state is None else len(self.state)

    def index(self, visits: int) -> int:
        return self.step

    def is_stochastic(self, index: int) -> bool:
        return True

    def next_latents(self, index: int, latents: Tensor, mean: Tensor, std: float) -> Tensor:
        self.latents, self.mean, self.std = latents, mean, std
        raise StepReplayed


class StartingFrom(Replay):
    """Run the first step from other latents than the pipeline's own, to see where they arrive."""

    def __init__(self, start: Tensor):
        super().__init__(step=0)
        self.start = start

    def first_latents(self, prepared: Tensor, layout: StateLayout) -> Tensor:
        return self.start


class BeforeSteps(Replay):
    """Leave when the pipeline asks for its timesteps: by then prompts are encoded, and no step has been run."""

    def __init__(self) -> None:
        super().__init__(step=0)

    def schedule(self, timesteps: Tensor, skipped: int) -> Tensor:
        raise StepReplayed

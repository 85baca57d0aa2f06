"""The policy scheduler: a diffusers scheduler whose step is a Gaussian policy that can be sampled and replayed.

One method gives the mean and standard deviation of a step; what differs between sampling and replay is only where the
action comes from. So the two cannot drift apart.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from ddpo_trl.schedulers.actions import ActionSource


class PolicyScheduler(ABC):
    """
    What every policy scheduler adds to the diffusers scheduler that it inherits from as well.

    Within [`~PolicyScheduler.acting`], `set_timesteps` shows the pipeline the steps that the action source wants and
    `step` asks it for the next latents.

    Attributes:
        source (`ActionSource`, *optional*):
            Where actions come from.
        stds (`list[float]`):
            Standard deviation of each step of the last schedule, if all get noise. It is known as soon as a pipeline
            has run a step, because pipelines choose timesteps by image size and strength.
    """

    source: ActionSource | None = None
    timesteps: Tensor
    _begin_index: int | None = None  # diffusers' own name, which `scale_noise` of flow matching reads
    _skipped = 0
    _visits = 0

    @abstractmethod
    def transition(self, model_output: Tensor, index: int, latents: Tensor, stochastic: bool) -> tuple[Tensor, float]:
        """
        Mean and standard deviation of p_θ(x_{t-1} | x_t) at step `index` of the current schedule.

        Args:
            model_output (`torch.Tensor` of shape `(B, ...)`):
                The denoiser's (guided) prediction, float32.
            index (`int`):
                Index into the full schedule.
            latents (`torch.Tensor` of shape `(B, ...)`):
                x_t, float32.
            stochastic (`bool`):
                Whether the step has noise.

        Returns:
            Mean of shape `(B, ...)` and the standard deviation, ≥ 0, as a number: it is known before the network runs,
            and reading it from a tensor would make the GPU wait.
        """

    @abstractmethod
    def std(self, index: int) -> float:
        """Standard deviation of step `index` of the current schedule."""

    @property
    @abstractmethod
    def noise_setting(self) -> tuple[str, float]:
        """Name and value of the setting that scales the noise of all steps."""

    @abstractmethod
    def largest_noise(self, index: int) -> float:
        """The largest value of that setting with which step `index` of the current schedule holds its noise."""

    def check_noise(self, steps: Collection[int]) -> None:
        """
        Checks that the steps that get noise can hold it. With more, the images have more noise than the denoiser
        was trained to see: it is another sampler than the one that is asked for.

        Args:
            steps (`Collection[int]`):
                Indices of the steps that may get noise, counted from the first that the pipeline runs.

        Raises:
            `ValueError`: If one can't, with the largest setting with which all can.
        """
        name, value = self.noise_setting
        noisy = [step for step in steps if self.std(self._skipped + step) > 0]
        largest = {step: self.largest_noise(self._skipped + step) for step in noisy}
        if noisy and value > (limit := min(largest.values())):
            raise ValueError(
                f"{name} is {value:g}, with which step {min(noisy, key=largest.__getitem__)} of {len(self.stds)} adds "
                f"more noise than it can hold. Set {name} to {rounded_down(limit):g} at most."
            )

    @property
    def stds(self) -> list[float]:
        return [self.std(index) for index in range(self._skipped, len(self.timesteps))]

    @contextmanager
    def acting(self, source: ActionSource) -> Iterator[None]:
        """Takes the actions of all steps from `source` while the context is open."""
        self.source = source
        try:
            yield
        finally:
            self.source = None

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Pipelines that don't start from pure noise tell here how many steps they leave out."""
        self._begin_index = self._skipped = begin_index

    def begin_schedule(self) -> None:
        """What every `set_timesteps` ends with: the source chooses among the timesteps of the full schedule."""
        self._begin_index = None
        self._visits = 0
        self.timesteps = self._source.schedule(self.timesteps, self._skipped)

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Any = None, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """
        The next latents of the current step.

        Args:
            model_output (`torch.Tensor` of shape `(B, ...)`):
                The denoiser's (guided) prediction.
            timestep (`torch.Tensor` or `int`):
                Not read: the scheduler counts its steps, so that no timestep is copied from a GPU.
            sample (`torch.Tensor` of shape `(B, ...)`):
                x_t, in the dtype in which x_{t-1} is returned.
            generator (*optional*):
                Not read, but some pipelines pass it: the noise is the action source's.
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return an output object or a tuple.
        """
        source = self._source
        index = source.index(self._visits)
        mean, std = self.transition(
            model_output.float(), self._skipped + index, sample.float(), source.is_stochastic(index)
        )
        next_latents = source.next_latents(index, sample, mean, std)
        self._visits += 1
        return SchedulerOutput(prev_sample=next_latents) if return_dict else (next_latents,)

    @property
    def _source(self) -> ActionSource:
        if self.source is None:
            raise RuntimeError("A policy scheduler steps only within `acting(source)`.")
        return self.source


def rounded_down(value: float) -> float:
    """A positive number with three significant digits, not above what it was."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return math.floor(value / unit) * unit

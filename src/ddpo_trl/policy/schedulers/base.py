"""The policy scheduler: a diffusers scheduler whose step is a Gaussian policy that can be sampled and replayed.

One method gives the mean and standard deviation of a step; what differs between sampling and replay is only where the
action comes from. So the two cannot drift apart.
"""

import functools
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from ddpo_trl.policy.schedulers.actions import ActionSource
from ddpo_trl.policy.schedulers.layout import WHOLE, StateLayout, is_whole
from ddpo_trl.transfers import to_device


class PolicyScheduler(ABC):
    """
    Mixin that turns the diffusers scheduler it is combined with into a policy.

    Within [`~PolicyScheduler.acting`], `set_timesteps` gives the pipeline the steps that the action source wants and
    `step` asks the source for the next latents.

    Attributes:
        source (`ActionSource`, *optional*):
            Source of the actions.
        stds (`list[float]`):
            Standard deviation of each step of the last schedule, if all get noise. It is known as soon as a pipeline
            has run a step, because pipelines choose timesteps by image size and strength.
        layout (`StateLayout`, *optional*):
            Position of the state in the result of `prepare_latents`, as soon as it is known.
    """

    source: ActionSource | None = None
    layout: StateLayout | None = None
    _prepared: Tensor | None = None
    timesteps: Tensor
    # diffusers' own names, which `scale_noise` of flow matching reads
    _begin_index: int | None = None
    _step_index: int | None = None
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
        Check that the steps that get noise can hold it. With more, the images have more noise than the denoiser was
        trained on: the sampler would not be the requested one.

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
        """Take the actions of all steps from `source` while the context is open."""
        self.source = source
        try:
            yield
        finally:
            self.source = self._prepared = None

    def first_latents(self, prepared: Tensor) -> Tensor:
        """Return the latents with which the pipeline starts, given those that its `prepare_latents` returned."""
        latents = self._source.first_latents(prepared, self.layout or WHOLE)
        # Recorded states are contiguous, an encoded image is not, and with other strides kernels round differently.
        latents = latents.contiguous()
        if self.layout is None:
            self._prepared = latents
        return latents

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Receive the number of steps that a pipeline skips because it does not start from pure noise."""
        self._begin_index = self._skipped = begin_index

    def begin_schedule(self) -> None:
        """Let the source choose among the timesteps of the full schedule: last step of every `set_timesteps`."""
        self._source.begin()
        self._begin_index = self._step_index = None
        self._visits = 0
        self.timesteps = self._source.schedule(self.timesteps, self._skipped)

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Any = None, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """
        The next latents of the current step.

        Args:
            model_output (`torch.Tensor` of shape `(B, ...)`):
                The denoiser's (guided) prediction.
            timestep (`torch.Tensor` or `int`):
                Where the pipeline starts its loop, if it did not call `set_begin_index`. Later steps are counted.
            sample (`torch.Tensor` of shape `(B, ...)`):
                x_t, in the dtype in which x_{t-1} is returned.
            generator (*optional*):
                Not read, but some pipelines pass it: the noise is the action source's.
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return an output object or a tuple.
        """
        source = self._source
        if self._visits == 0:
            self._begin_loop(timestep, sample)
        index = source.index(self._visits)
        mean, std = self.transition(
            model_output.float(), self._skipped + index, sample.float(), source.is_stochastic(index)
        )
        rows = source.batch_size or len(sample)
        action = source.next_latents(index, by_sample(sample, rows), by_sample(mean, rows), std)
        # The same tensor, where it has the shape: the next step records it too, and it is kept once.
        next_latents = action if action.shape == sample.shape else action.view(sample.shape)
        self._visits += 1
        self._step_index = self._skipped + self._visits
        return SchedulerOutput(prev_sample=next_latents) if return_dict else (next_latents,)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Return the sample as it is: the states of a policy have the scale that the denoiser reads."""
        return sample

    def _begin_loop(self, timestep: Any, sample: Tensor) -> None:
        """Learn from the first step how many steps the pipeline skips, and whether its latents are the state."""
        if self._begin_index is None:
            self._skipped = self._position(timestep)
        if self._prepared is not None and is_whole(self._prepared, sample):
            self.layout = WHOLE
        self._prepared = None

    def _position(self, timestep: Any) -> int:
        """
        Return the position of a timestep in the schedule that the pipeline sees. Raise a `ValueError` if it is not
        part of it.
        """
        if isinstance(timestep, Tensor) and shares_memory(timestep, self.timesteps):  # nothing is read from a GPU
            return int(timestep.storage_offset() - self.timesteps.storage_offset())
        positions = (self.timesteps == timestep).nonzero()
        if len(positions) == 0:
            raise ValueError(
                f"The pipeline starts at timestep {float(timestep):g}, which is not in the schedule of its scheduler "
                f"({', '.join(f'{each:g}' for each in self.timesteps.tolist())}): the coefficients of its steps are "
                "unknown. Take timesteps, sigmas and the like out of pipeline_kwargs, or let the pipeline call "
                "`scheduler.step` with its scheduler's timesteps."
            )
        return int(positions[0])

    @property
    def _source(self) -> ActionSource:
        if self.source is None:
            raise RuntimeError("A policy scheduler steps only within `acting(source)`.")
        return self.source


@functools.cache
def policy_class(policy: Any, base: Any) -> Any:
    """
    Return the class of a policy over the timesteps and settings of a diffusers scheduler class.

    A class and not a wrapper, because pipelines ask for their scheduler's type, config and signatures.

    Args:
        policy (`type`):
            Subclass of [`PolicyScheduler`].
        base (`type`):
            Class of the diffusers scheduler.
    """
    signature = inspect.signature(base.set_timesteps)

    @functools.wraps(base.set_timesteps)  # pipelines read its signature
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        arguments = signature.bind(self, *args, **kwargs)
        device = arguments.arguments.get("device")
        arguments.arguments["device"] = "cpu"  # the schedule is read as numbers: a GPU would have to wait
        base.set_timesteps(*arguments.args, **arguments.kwargs)
        self.begin_schedule()
        self.timesteps = to_device(self.timesteps, device)

    return type(
        f"{base.__name__.removesuffix('Scheduler')}PolicyScheduler",
        (policy, base),
        {"__doc__": policy.__doc__, "set_timesteps": set_timesteps},
    )


def by_sample(tensor: Tensor, samples: int) -> Tensor:
    """Reshape a tensor that may have a row per frame to one row per sample."""
    return tensor if len(tensor) == samples else tensor.reshape(samples, -1, *tensor.shape[1:])


def shares_memory(view: Tensor, tensor: Tensor) -> bool:
    """Return whether a tensor is a view of another's memory."""
    return view.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()


def rounded_down(value: float) -> float:
    """Round a positive number down to three significant digits."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return math.floor(value / unit) * unit

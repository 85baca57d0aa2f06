"""The policy scheduler: a diffusers scheduler whose step is a Gaussian policy that can be sampled and replayed.

One method gives the mean and standard deviation of a step; what differs between sampling and replay is only where the
action comes from. So the two cannot drift apart.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    DDIMParallelScheduler,
    DDIMScheduler,
    DDPMParallelScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ddpo_trl.gaussian import Reduction, log_prob
from ddpo_trl.types import Step


# Their configs describe a variance-preserving diffusion by its betas, which is all that DDIM's transition needs.
VARIANCE_PRESERVING_SCHEDULERS = (
    DDIMScheduler,
    DDIMParallelScheduler,
    DDPMScheduler,
    DDPMParallelScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


class ActionSource(ABC):
    """Where the action x_{t-1} of a step comes from."""

    @abstractmethod
    def first_step(self) -> int:
        """Index of the first step that the pipeline will run."""

    @abstractmethod
    def last_step(self, num_steps: int) -> int:
        """Index after the last step that the pipeline will run, of `num_steps` in the schedule."""

    @abstractmethod
    def next_latents(self, index: int, latents: Tensor, mean: Tensor, std: float) -> Tensor:
        """
        The action of step `index` in state `latents`, `(B, ...)` in their dtype, under N(mean, std² I); `std` is 0 on
        a deterministic step.
        """


class Sampling(ActionSource):
    """
    Draws every action from the policy and records the steps in `record`.

    Args:
        generators (`Sequence[torch.Generator]` of length `B`):
            One per sample, so that a sample's noise does not depend on the batch it is in.
        record (`Collection[int]`):
            Indices of the steps to keep; deterministic ones have no density and are never kept.
        reduction (`"mean"` or `"sum"`):
            Reduction of the log-probabilities over the latent dimensions.

    Attributes:
        steps (`dict[int, Step]`):
            What was recorded, by step index.
    """

    def __init__(self, generators: Sequence[torch.Generator], record: Collection[int], reduction: Reduction):
        self.generators = list(generators)
        self.record = record
        self.reduction = reduction
        self.steps: dict[int, Step] = {}

    def first_step(self) -> int:
        return 0

    def last_step(self, num_steps: int) -> int:
        return num_steps

    def next_latents(self, index: int, latents: Tensor, mean: Tensor, std: float) -> Tensor:
        action = mean
        if std > 0:
            action = mean + std * randn_tensor(mean.shape, generator=self.generators, device=mean.device)
        # Rounded before the density is taken: in bf16 the rounding alone moves a log-probability by more than ε.
        action = action.to(latents.dtype)
        if std > 0 and index in self.record:
            log_probs = log_prob(action, mean, std, self.reduction)
            self.steps[index] = Step(latents=latents, next_latents=action, log_probs=log_probs)
        return action


class Replay(ActionSource):
    """
    Makes the pipeline run one recorded step again, and keeps the policy's distribution over its action.

    Args:
        index (`int`):
            Index of the recorded step.
        action (`torch.Tensor` of shape `(B, ...)`):
            The recorded action.

    Attributes:
        mean (`torch.Tensor` of shape `(B, ...)`):
            μ_θ(x_t), float32, with gradient if grad mode is on.
        std (`float`):
            σ_t.
    """

    def __init__(self, index: int, action: Tensor):
        self.index = index
        self.action = action
        self.visits = 0
        self.mean: Tensor
        self.std: float

    def first_step(self) -> int:
        return self.index

    def last_step(self, num_steps: int) -> int:
        return self.index + 1

    def next_latents(self, index: int, latents: Tensor, mean: Tensor, std: float) -> Tensor:
        self.visits += 1
        self.mean, self.std = mean, std
        return self.action


class PolicyScheduler(ABC):
    """
    What every policy scheduler adds to the diffusers scheduler that it inherits from as well.

    Within [`~PolicyScheduler.acting`], `set_timesteps` leaves the steps that the action source wants and `step` asks
    it for the next latents. `step` names neither `eta` nor `generator`, so pipelines hand over neither: the noise is
    the action source's.

    Attributes:
        source (`ActionSource`, *optional*):
            Where actions come from.
    """

    source: ActionSource | None = None
    _index = 0

    @abstractmethod
    def transition(self, model_output: Tensor, index: int, latents: Tensor) -> tuple[Tensor, float]:
        """
        Mean and standard deviation of p_θ(x_{t-1} | x_t) at step `index` of the current schedule.

        Args:
            model_output (`torch.Tensor` of shape `(B, ...)`):
                The denoiser's (guided) prediction, float32.
            index (`int`):
                Index into the full schedule.
            latents (`torch.Tensor` of shape `(B, ...)`):
                x_t, float32.

        Returns:
            Mean of shape `(B, ...)` and the standard deviation, ≥ 0, as a number: it is known before the network runs,
            and reading it from a tensor would make the GPU wait.
        """

    @abstractmethod
    def stds(self, num_inference_steps: int) -> list[float]:
        """Standard deviation of each step of a schedule of `num_inference_steps` steps."""

    @contextmanager
    def acting(self, source: ActionSource) -> Iterator[None]:
        """Takes the actions of all steps from `source` while the context is open."""
        self.source = source
        try:
            yield
        finally:
            self.source = None

    def _keep_wanted_timesteps(self) -> None:
        if self.source is None:
            raise RuntimeError("A policy scheduler steps only within `acting(source)`.")
        self._index = self.source.first_step()
        self.timesteps: Tensor = self.timesteps[self._index : self.source.last_step(len(self.timesteps))]

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True
    ) -> DDIMSchedulerOutput | tuple[Tensor]:
        """
        The next latents of the current step.

        Args:
            model_output (`torch.Tensor` of shape `(B, ...)`):
                The denoiser's (guided) prediction.
            timestep (`torch.Tensor` or `int`):
                Not read: the scheduler counts its steps, so that no timestep is copied from a GPU.
            sample (`torch.Tensor` of shape `(B, ...)`):
                x_t, in the dtype in which x_{t-1} is returned.
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return an output object or a tuple.
        """
        if self.source is None:
            raise RuntimeError("A policy scheduler steps only within `acting(source)`.")
        mean, std = self.transition(model_output.float(), self._index, sample.float())
        next_latents = self.source.next_latents(self._index, sample, mean, std)
        self._index += 1
        return DDIMSchedulerOutput(prev_sample=next_latents) if return_dict else (next_latents,)


@dataclass(frozen=True, kw_only=True)
class DDIMCoefficients:
    """
    The numbers of one DDIM step, in the notation of https://huggingface.co/papers/2010.02502, eq. 12.

    Args:
        signal, noise (`float`):
            √ᾱ_t and √(1 − ᾱ_t).
        next_signal (`float`):
            √ᾱ_{t-1}.
        direction (`float`):
            √(1 − ᾱ_{t-1} − σ_t²), the weight of the predicted noise in x_{t-1}.
        std (`float`):
            σ_t(η) = η · √((1 − ᾱ_{t-1}) / (1 − ᾱ_t)) · √(1 − ᾱ_t / ᾱ_{t-1}).
    """

    signal: float
    noise: float
    next_signal: float
    direction: float
    std: float


class DDIMPolicyScheduler(PolicyScheduler, DDIMScheduler):
    """
    DDIM with η > 0 as a policy, for every variance-preserving diffusion: epsilon, v and sample prediction.

    Build it with [`policy_scheduler`], which checks the config.

    Attributes:
        eta (`float`):
            η: 1 is DDPM's (ancestral) variance, 0 the deterministic sampler.
    """

    eta = 1.0

    @functools.wraps(DDIMScheduler.set_timesteps)  # pipelines read its signature
    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        super().set_timesteps(num_inference_steps, device)
        self._keep_wanted_timesteps()

    def stds(self, num_inference_steps: int) -> list[float]:
        return [step.std for step in self._coefficients(num_inference_steps)]

    def transition(self, model_output: Tensor, index: int, latents: Tensor) -> tuple[Tensor, float]:
        c = self._coefficients(self.num_inference_steps)[index]
        match self.config.prediction_type:
            case "epsilon":
                predicted_noise = model_output
                predicted_original = (latents - c.noise * model_output) / c.signal
            case "v_prediction":
                predicted_noise = c.signal * model_output + c.noise * latents
                predicted_original = c.signal * latents - c.noise * model_output
            case "sample":
                predicted_noise = (latents - c.signal * model_output) / c.noise
                predicted_original = model_output
        return c.next_signal * predicted_original + c.direction * predicted_noise, c.std

    def _coefficients(self, num_inference_steps: int) -> list[DDIMCoefficients]:
        if num_inference_steps not in self._coefficients_by_length:
            schedule = DDIMScheduler.from_config(self.config)
            schedule.set_timesteps(num_inference_steps)
            self._coefficients_by_length[num_inference_steps] = [
                self._coefficients_at(timestep, timestep - self.config.num_train_timesteps // num_inference_steps)
                for timestep in schedule.timesteps.tolist()
            ]
        return self._coefficients_by_length[num_inference_steps]

    @functools.cached_property
    def _coefficients_by_length(self) -> dict[int, list[DDIMCoefficients]]:
        return {}

    def _coefficients_at(self, timestep: int, next_timestep: int) -> DDIMCoefficients:
        # float32 tensors up to the last line, in diffusers' order: η = 0 then is DDIMScheduler.step to the bit.
        alpha = self.alphas_cumprod[timestep]
        next_alpha = self.alphas_cumprod[next_timestep] if next_timestep >= 0 else self.final_alpha_cumprod
        std = self.eta * ((1 - next_alpha) / (1 - alpha) * (1 - alpha / next_alpha)) ** 0.5
        # With zero terminal SNR and η = 1 the difference is 0, or -1e-8 by rounding.
        direction = (1 - next_alpha - std**2).clamp(min=0) ** 0.5
        return DDIMCoefficients(
            signal=float(alpha**0.5),
            noise=float((1 - alpha) ** 0.5),
            next_signal=float(next_alpha**0.5),
            direction=float(direction),
            std=float(std),
        )


def policy_scheduler(scheduler: SchedulerMixin, eta: float) -> DDIMPolicyScheduler:
    """
    Turns a pipeline's scheduler into the policy scheduler of the same diffusion.

    Args:
        scheduler ([`~diffusers.SchedulerMixin`]):
            The pipeline's own scheduler. It is left as it is.
        eta (`float`):
            η of the DDIM family, > 0.

    Raises:
        `ValueError`: If the scheduler does not describe a variance-preserving diffusion, or clips its predictions
            (the density of a clipped step is not the Gaussian's).
    """
    name = type(scheduler).__name__
    config = scheduler.config
    if not isinstance(scheduler, VARIANCE_PRESERVING_SCHEDULERS) or config.get("use_flow_sigmas", False):
        supported = ", ".join(cls.__name__ for cls in VARIANCE_PRESERVING_SCHEDULERS)
        raise ValueError(
            f"pipeline.scheduler is {name}, whose steps can't be turned into a Gaussian policy of the DDIM family. "
            f"Set pipeline.scheduler to one of {supported} if the model was trained with variance-preserving noise."
        )
    prediction_type = config.get("prediction_type", "epsilon")
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(
            f"pipeline.scheduler.config.prediction_type is {prediction_type!r}; the policy needs one of "
            f"{', '.join(PREDICTION_TYPES)}."
        )
    for option in ("clip_sample", "thresholding"):
        if config.get(option, False):
            raise ValueError(
                f"pipeline.scheduler.config.{option} is True: a clipped step has no Gaussian density. Switch it off "
                f"with `pipeline.scheduler = {name}.from_config(pipeline.scheduler.config, {option}=False)`."
            )
    # Values that the pipeline's class chose by default are part of its diffusion (Heun's betas are not DDIM's), but
    # `from_config` would replace those listed here by DDIM's. `clip_sample` other classes lack, and DDIM's is True.
    settings = {key: value for key, value in config.items() if key != "_use_default_values"}
    policy = DDIMPolicyScheduler.from_config(settings, clip_sample=False)
    policy.eta = eta
    return policy

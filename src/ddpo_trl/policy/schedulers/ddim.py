"""DDIM with η > 0: the policy of every variance-preserving diffusion."""

import functools
import math
from dataclasses import dataclass
from typing import Any, NoReturn

from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from torch import Tensor

from ddpo_trl.policy.schedulers.base import PolicyScheduler


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
        largest_eta (`float`):
            √((1 − ᾱ_t) / (1 − ᾱ_t / ᾱ_{t-1})), with which σ_t² is all of x_{t-1}'s noise, 1 − ᾱ_{t-1}. Never below 1.
    """

    signal: float
    noise: float
    next_signal: float
    direction: float
    std: float
    largest_eta: float


class DDIMPolicyScheduler(PolicyScheduler):
    """
    DDIM with η > 0 as a policy, for every variance-preserving diffusion: epsilon, v and sample prediction.

    Build it with [`~ddpo_trl.policy.schedulers.policy_scheduler`], which checks the config.

    Attributes:
        eta (`float`):
            η: 1 is DDPM's (ancestral) variance, 0 the deterministic sampler.
    """

    eta = 1.0
    config: Any
    alphas_cumprod: Tensor
    final_alpha_cumprod: Tensor
    num_inference_steps: int
    _predicted_original: Tensor  # of the last step, for pipelines that decode it

    def begin_schedule(self) -> None:
        timesteps = self.timesteps.tolist()
        key = self.num_inference_steps, self.eta, *timesteps
        if key not in self._known_coefficients:  # every replay comes through here
            self._known_coefficients[key] = [
                {noisy: self._coefficients_at(*step, self.eta * noisy) for noisy in (False, True)}
                for step in zip(timesteps, self._next_timesteps(timesteps), strict=True)
            ]
        self._coefficients = self._known_coefficients[key]
        super().begin_schedule()

    def _next_timesteps(self, timesteps: list[int]) -> list[int]:
        if not isinstance(self, DDIMScheduler):  # a distilled model's own
            return [*timesteps[1:], -1]
        stride = self.config.num_train_timesteps // self.num_inference_steps
        return [timestep - stride for timestep in timesteps]  # in diffusers' DDIM, whatever the spacing is

    @functools.cached_property
    def _known_coefficients(self) -> dict[tuple[float, ...], list[dict[bool, DDIMCoefficients]]]:
        return {}

    def std(self, index: int) -> float:
        return self._coefficients[index][True].std

    @property
    def noise_setting(self) -> tuple[str, float]:
        return "eta", self.eta

    def largest_noise(self, index: int) -> float:
        return self._coefficients[index][True].largest_eta

    def transition(self, model_output: Tensor, index: int, latents: Tensor, stochastic: bool) -> tuple[Tensor, float]:
        c = self._coefficients[index][stochastic]
        predicted_original, predicted_noise = self._prediction(model_output, latents, c)
        self._predicted_original = predicted_original.detach()
        return c.next_signal * predicted_original + c.direction * predicted_noise, c.std

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Any = None, return_dict: bool = True
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """
        Return the next latents, and the image predicted in this step: some pipelines decode it after the last one.
        """
        (next_latents,) = super().step(model_output, timestep, sample, generator, return_dict=False)
        predicted = self._predicted_original.to(sample.dtype)
        if return_dict:
            return DDIMSchedulerOutput(prev_sample=next_latents, pred_original_sample=predicted)
        return next_latents, predicted

    def _prediction(self, model_output: Tensor, latents: Tensor, c: DDIMCoefficients) -> tuple[Tensor, Tensor]:
        """Return x_0 and the noise in x_t, as the model predicts them."""
        if model_output.shape[1] == 2 * latents.shape[1]:  # a learned variance too, which DDIM does not use
            model_output = model_output.chunk(2, dim=1)[0]
        match self.config.prediction_type:
            case "epsilon":
                return (latents - c.noise * model_output) / c.signal, model_output
            case "v_prediction":
                return c.signal * latents - c.noise * model_output, c.signal * model_output + c.noise * latents
            case _:
                return model_output, (latents - c.signal * model_output) / c.noise

    @property
    def sigmas(self) -> NoReturn:
        """Raise a `ValueError`: states of schedulers with `sigmas` have another scale than those of this policy."""
        raise ValueError(
            "The pipeline computes with the noise levels of its scheduler (`scheduler.sigmas`), as models with EDM's "
            "preconditioning do. It can't be a policy of the DDIM family, whose states have another scale."
        )

    def _coefficients_at(self, timestep: int, next_timestep: int, eta: float) -> DDIMCoefficients:
        # float32 tensors up to the last line, in diffusers' order: with η = 0 bitwise identical to DDIMScheduler.step.
        alpha = self.alphas_cumprod[timestep]
        next_alpha = self.alphas_cumprod[next_timestep] if next_timestep >= 0 else self.final_alpha_cumprod
        std = eta * ((1 - next_alpha) / (1 - alpha) * (1 - alpha / next_alpha)) ** 0.5
        # With zero terminal SNR and η = 1 the difference is 0, or -1e-8 by rounding.
        direction = (1 - next_alpha - std**2).clamp(min=0) ** 0.5
        drawn = 1 - float(alpha) / float(next_alpha)  # in float64: 1 - alpha is not below it, so η = 1 always fits
        return DDIMCoefficients(
            signal=float(alpha**0.5),
            noise=float((1 - alpha) ** 0.5),
            next_signal=float(next_alpha**0.5),
            direction=float(direction),
            std=float(std),
            largest_eta=math.sqrt((1 - float(alpha)) / drawn) if drawn > 0 else math.inf,
        )

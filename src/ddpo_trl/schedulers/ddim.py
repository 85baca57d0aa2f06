"""DDIM with η > 0: the policy of every variance-preserving diffusion."""

import functools
import math
from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from ddpo_trl.schedulers.policy import PolicyScheduler


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


class DDIMPolicyScheduler(PolicyScheduler, DDIMScheduler):
    """
    DDIM with η > 0 as a policy, for every variance-preserving diffusion: epsilon, v and sample prediction.

    Build it with [`~ddpo_trl.schedulers.policy_scheduler`], which checks the config.

    Attributes:
        eta (`float`):
            η: 1 is DDPM's (ancestral) variance, 0 the deterministic sampler.
    """

    eta = 1.0

    @functools.wraps(DDIMScheduler.set_timesteps)  # pipelines read its signature
    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        super().set_timesteps(num_inference_steps, device="cpu")
        key = num_inference_steps, self.eta
        if key not in self._known_coefficients:  # every replay comes through here
            stride = self.config.num_train_timesteps // num_inference_steps
            self._known_coefficients[key] = [
                {noisy: self._coefficients_at(t, t - stride, self.eta * noisy) for noisy in (False, True)}
                for t in self.timesteps.tolist()
            ]
        self._coefficients = self._known_coefficients[key]
        self.begin_schedule()
        self.timesteps = self.timesteps.to(device)

    @functools.cached_property
    def _known_coefficients(self) -> dict[tuple[int, float], list[dict[bool, DDIMCoefficients]]]:
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
        if model_output.shape[1] == 2 * latents.shape[1]:  # a learned variance too, which DDIM does not use
            model_output = model_output.chunk(2, dim=1)[0]
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

    def _coefficients_at(self, timestep: int, next_timestep: int, eta: float) -> DDIMCoefficients:
        # float32 tensors up to the last line, in diffusers' order: η = 0 then is DDIMScheduler.step to the bit.
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

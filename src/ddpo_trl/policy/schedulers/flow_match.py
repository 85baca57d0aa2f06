"""Flow matching as a policy: two forms of stochastic steps.

The state at time σ is x_σ = (1 − σ) x_0 + σ ε, the denoiser predicts the velocity v = ε − x_0, and a step goes from σ
to σ' < σ. Both forms are Gaussian and become the ODE's Euler step x + (σ' − σ) v without noise.

- "sde" discretizes the SDE with the ODE's marginals. Their error is O(σ − σ'), except for the first steps from σ = 1,
  where std² = a²/k at the k-th step however short it is.
- "cps" gives signal and noise the exact weights of x_σ'. In return the noise that stays is correlated with the image
  predicted: Gaussian data of variance s² come out with s² (1 + cos(a π / 2)) / 2, however many steps there are.
"""

import math
from typing import Any, Literal

import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from ddpo_trl.policy.schedulers.base import PolicyScheduler


SdeType = Literal["sde", "cps"]

# Of 1000 timesteps: by so much diffusers' pipelines let a token's be below that of the step it makes.
TOKEN_TOLERANCE = 1e-3


def sde_std(sigma: float, next_sigma: float, noise_level: float) -> float:
    """
    Standard deviation g(σ)·√(σ − σ') of a marginal-preserving step, eq. 9 and sec. 4.1 of
    https://huggingface.co/papers/2505.05470, with the diffusion coefficient g(σ) = a·√(σ / (1 − σ)).

    g is infinite at σ = 1, where the authors' code puts 1 − σ' instead of 1 − σ. Here the length of the step, σ − σ',
    takes its place wherever it is longer: the same at σ = 1, and without a leap just below it, where solvers start
    (UniPC at 1 − 10⁻⁶, whose first step would have std 200). So std² never exceeds a²·σ.

    Args:
        sigma, next_sigma (`float`):
            σ and σ', in [0, 1].
        noise_level (`float`):
            a, ≥ 0.
    """
    length = sigma - next_sigma
    return noise_level * math.sqrt(sigma * length / max(1 - sigma, length))


def largest_sde_noise(sigma: float, next_sigma: float) -> float:
    """
    The a in [`sde_std`] with which a step draws as much noise as its state has, std = σ. Never below √½.

    Args:
        sigma, next_sigma (`float`):
            σ > σ', in [0, 1].
    """
    length = sigma - next_sigma
    return math.sqrt(sigma * max(1 - sigma, length) / length)


def sde_mean(latents: Tensor, velocity: Tensor, sigma: float, next_sigma: float, std: float) -> Tensor:
    """
    Mean of a marginal-preserving step: the ODE's, pulled along the score −(x + (1 − σ) v) / σ by std² / 2.

    Args:
        latents, velocity (`torch.Tensor` of shape `(B, ...)`):
            x and v.
        sigma, next_sigma (`float`):
            σ > 0 and σ'.
        std (`float`):
            [`sde_std`] of the step.
    """
    if std == 0:  # at σ = 0 too
        return latents + (next_sigma - sigma) * velocity
    predicted_noise = latents + (1 - sigma) * velocity
    return latents + (next_sigma - sigma) * velocity - std**2 / (2 * sigma) * predicted_noise


def cps_std(next_sigma: float, noise_level: float) -> float:
    """
    Standard deviation σ'·sin(a π / 2) of a coefficient-preserving step, https://huggingface.co/papers/2509.05952.

    Args:
        next_sigma (`float`):
            σ', in [0, 1].
        noise_level (`float`):
            a, in [0, 1]: the share, as an angle, of the noise that is drawn again.
    """
    return next_sigma * math.sin(noise_level * math.pi / 2)


def cps_mean(latents: Tensor, velocity: Tensor, sigma: float, next_sigma: float, std: float) -> Tensor:
    """
    Mean (1 − σ') x̂_0 + √(σ'² − std²) ε̂ of a coefficient-preserving step: signal and noise keep the weights 1 − σ' and
    σ' that the denoiser was trained with, exactly.

    Args:
        latents, velocity, sigma, next_sigma:
            As for [`sde_mean`].
        std (`float`):
            [`cps_std`] of the step.
    """
    if std == 0:  # the same number, in diffusers' order
        return latents + (next_sigma - sigma) * velocity
    predicted_original = latents - sigma * velocity
    predicted_noise = latents + (1 - sigma) * velocity
    return (1 - next_sigma) * predicted_original + math.sqrt(next_sigma**2 - std**2) * predicted_noise


class FlowMatchPolicyScheduler(PolicyScheduler):
    """
    Flow matching as a policy over the schedule of any diffusers scheduler that has `sigmas`: the timesteps, shifts and
    custom sigmas stay that scheduler's own, and only its step is replaced.

    Build it with [`~ddpo_trl.policy.schedulers.policy_scheduler`].

    Attributes:
        noise_level (`float`):
            a in [`sde_std`] or [`cps_std`]; 0 is the deterministic sampler.
        sde_type (`"sde"` or `"cps"`):
            Marginal-preserving or coefficient-preserving.
    """

    noise_level = 0.7
    sde_type: SdeType = "sde"
    config: Any
    sigmas: Tensor
    _sigmas: list[float]
    _timesteps_are_sigmas: bool

    def begin_schedule(self) -> None:
        sigmas = self.sigmas.tolist()
        if not 0 <= min(sigmas) <= max(sigmas) <= 1:
            raise ValueError(
                f"pipeline.scheduler made sigmas from {min(sigmas):.3g} to {max(sigmas):.3g}, but those of flow "
                "matching are between 0 and 1. Take sigma_min, sigma_max, use_karras_sigmas or use_exponential_sigmas "
                "out of its config; a model that was trained on EDM's noise levels can't be a flow matching policy."
            )
        self._sigmas = [1 - sigma for sigma in sigmas] if self._is_inverted else sigmas
        in_timesteps = self.sigmas[:-1] * self.config.num_train_timesteps
        self._timesteps_are_sigmas = torch.allclose(self.timesteps.float(), in_timesteps, atol=1e-2)
        super().begin_schedule()
        # Some pipelines read them by their position in the loop.
        self.sigmas = torch.cat([self._source.schedule(self.sigmas[:-1], self._skipped), self.sigmas[-1:]])

    def std(self, index: int) -> float:
        sigma, next_sigma = self._sigmas[index : index + 2]
        if next_sigma <= 0 or next_sigma >= sigma:  # noise would stay in the image, or the step has no length
            return 0.0
        if self.sde_type == "cps":
            return cps_std(next_sigma, self.noise_level)
        return sde_std(sigma, next_sigma, self.noise_level)

    @property
    def noise_setting(self) -> tuple[str, float]:
        return "noise_level", self.noise_level

    def largest_noise(self, index: int) -> float:
        if self.sde_type == "cps":
            return 1.0  # all of the noise is drawn again
        sigma, next_sigma = self._sigmas[index : index + 2]
        return largest_sde_noise(sigma, next_sigma)

    def transition(self, model_output: Tensor, index: int, latents: Tensor, stochastic: bool) -> tuple[Tensor, float]:
        sigma, next_sigma = self._sigmas[index : index + 2]
        std = self.std(index) if stochastic else 0.0
        velocity = -model_output if self._is_inverted else model_output
        mean = cps_mean if self.sde_type == "cps" else sde_mean
        return mean(latents, velocity, sigma, next_sigma, std), std

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Any = None,
        return_dict: bool = True,
        per_token_timesteps: Tensor | None = None,
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """
        As [`PolicyScheduler.step`].

        Args:
            per_token_timesteps (`torch.Tensor` of shape `(B, N)` or `(B, 1)`, *optional*):
                If given, the model output is the negative velocity, as in diffusers' schedulers. Tokens with a
                timestep below the step's are conditions: they keep their state until the schedule is there, and
                what the network predicts of them is not part of the density.
        """
        if per_token_timesteps is None:
            return super().step(model_output, timestep, sample, generator, return_dict)
        if not self._timesteps_are_sigmas:
            raise ValueError(
                "The pipeline steps by the timesteps of its tokens, but those of pipeline.scheduler are not its "
                "sigmas. Set pipeline.scheduler to one without shift_terminal, use_dynamic_shifting and a shift: "
                "`FlowMatchEulerDiscreteScheduler()`."
            )
        kept = (per_token_timesteps < timestep - TOKEN_TOLERANCE).unsqueeze(-1)
        velocity = -model_output.masked_fill(kept, 0.0)
        (stepped,) = super().step(velocity, timestep, sample, generator, return_dict=False)
        next_latents = torch.where(kept, sample, stepped)
        return SchedulerOutput(prev_sample=next_latents) if return_dict else (next_latents,)

    @property
    def _is_inverted(self) -> bool:
        """Return whether the schedule runs from 0 to 1 and the velocity towards the image, as Mochi's do."""
        return self.config.get("invert_sigmas", False)

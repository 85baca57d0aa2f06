"""The Gaussian policy π(x_{t-1} | x_t) = N(μ, σ² I): its log-density and the KL divergence between two of them.

Pure functions of tensors. All arithmetic is float32: a log-probability difference of 1e-4 already is the whole clip
range of DDPO.
"""

import math
from typing import Literal

from torch import Tensor


Reduction = Literal["mean", "sum"]

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


def reduce_latents(values: Tensor, reduction: Reduction) -> Tensor:
    """Reduces `(B, ...)` over the latent dimensions to `(B,)`."""
    flat = values.flatten(1)
    return flat.mean(1) if reduction == "mean" else flat.sum(1)


def log_prob(x: Tensor, mean: Tensor, std: float, reduction: Reduction = "mean") -> Tensor:
    """
    Log-density of `x` under N(mean, std² I), eq. 4 of https://huggingface.co/papers/2305.13301 for one step.

    Args:
        x (`torch.Tensor` of shape `(B, ...)`):
            Where the density is evaluated.
        mean (`torch.Tensor` of shape `(B, ...)`):
            Mean of the Gaussian; gradients flow through it.
        std (`float`):
            Standard deviation, > 0, the same for all samples and dimensions.
        reduction (`"mean"` or `"sum"`):
            `"sum"` is the joint log-density in nats; `"mean"` divides it by the number D of latent dimensions, which
            makes a ratio of such densities the D-th root of the true one.

    Returns:
        `torch.Tensor` of shape `(B,)`, float32.
    """
    deviation = (x.float() - mean.float()) / std
    return reduce_latents(-0.5 * deviation**2 - (math.log(std) + HALF_LOG_2PI), reduction)


def kl_divergence(mean: Tensor, reference_mean: Tensor, std: float, reduction: Reduction = "mean") -> Tensor:
    """
    KL(N(mean, std² I) ‖ N(reference_mean, std² I)) = ‖mean − reference_mean‖² / (2 std²).

    `std` is the full standard deviation of the step. The closed form holds because the variance of a denoising step
    does not depend on the network.

    Args:
        mean, reference_mean (`torch.Tensor` of shape `(B, ...)`):
            Means of the two Gaussians.
        std (`float`):
            Their common standard deviation, > 0.
        reduction (`"mean"` or `"sum"`):
            As in [`log_prob`].

    Returns:
        `torch.Tensor` of shape `(B,)`, float32, nats, ≥ 0.
    """
    return reduce_latents(0.5 * ((mean.float() - reference_mean.float()) / std) ** 2, reduction)

"""The two policy-gradient objectives of DDPO: pure functions of a micro-batch of transitions."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpo_trl.config import DDPOConfig


@dataclass(frozen=True, kw_only=True)
class Objective:
    """
    Result of an objective: the scalar to minimize and detached statistics to log.

    Args:
        loss (`torch.Tensor` of shape `()`):
            Mean over the micro-batch.
        metrics (`dict[str, torch.Tensor]`):
            Scalars without gradient, named as they are logged.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


def score_function(log_probs: Tensor, advantages: Tensor) -> Objective:
    """
    DDPO_SF, the score-function (REINFORCE) estimator: L = −mean(A · log π_θ).

    Its gradient is an unbiased policy gradient only if the samples come from the current θ, so it allows one update
    per rollout. Eq. 6 of https://huggingface.co/papers/2305.13301, averaged over steps instead of summed.

    Args:
        log_probs (`torch.Tensor` of shape `(B,)`):
            log π_θ of the recorded actions, with gradient.
        advantages (`torch.Tensor` of shape `(B,)`):
            Advantages, without gradient.
    """
    return Objective(loss=-(advantages * log_probs).mean(), metrics={})


def importance_sampling(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, cliprange: float) -> Objective:
    """
    DDPO_IS, the importance-sampled estimator with PPO's clipping: L = −mean(min(r·A, clip(r, 1−ε, 1+ε)·A)).

    r = exp(log π_θ − log π_old), never a quotient of densities. Outside the trusted interval, on the side that would
    go further, the gradient is exactly zero. Eq. 7 of https://huggingface.co/papers/2305.13301 with the clipping of
    https://huggingface.co/papers/1707.06347.

    Args:
        log_probs (`torch.Tensor` of shape `(B,)`):
            log π_θ of the recorded actions, with gradient.
        old_log_probs (`torch.Tensor` of shape `(B,)`):
            log π_old of the same actions, without gradient.
        advantages (`torch.Tensor` of shape `(B,)`):
            Advantages, without gradient.
        cliprange (`float`):
            Half-width ε of the trusted interval around a ratio of 1.
    """
    log_ratio = log_probs - old_log_probs
    ratio = torch.exp(log_ratio)
    # min(r·A, clip(r)·A) is r·A with r bounded from above where A ≥ 0 and from below elsewhere. Bounded before exp: an
    # infinite ratio would turn the clipped side's zero gradient into NaN.
    upper, lower = math.log1p(cliprange), math.log1p(-cliprange) if cliprange < 1 else -math.inf
    bounded = torch.where(advantages >= 0, log_ratio.clamp(max=upper), log_ratio.clamp(min=lower))
    loss = -(torch.exp(bounded) * advantages).mean()
    metrics = {
        "policy/approxkl_avg": 0.5 * (log_ratio.detach() ** 2).mean(),
        "policy/clipfrac_avg": ((ratio.detach() - 1).abs() > cliprange).float().mean(),
        "val/ratio": ratio.detach().mean(),
    }
    return Objective(loss=loss, metrics=metrics)


def objective(config: DDPOConfig, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor) -> Objective:
    """Compute the objective that `loss_type` names; shapes as for [`importance_sampling`]."""
    if config.loss_type == "sf":
        return score_function(log_probs, advantages)
    return importance_sampling(log_probs, old_log_probs, advantages, config.cliprange)

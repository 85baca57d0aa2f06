"""Comparison of replayed with sampled log-probabilities before any update."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.utils import logging

from ddpo_trl.checks.causes import diagnosis
from ddpo_trl.checks.mismatch import (
    FLOAT32_ROUNDING,
    FLOAT32_TOLERANCE,
    HALF_DTYPES,
    HALF_PRECISION_ROUNDING,
    Mismatch,
    log_prob_difference,
)
from ddpo_trl.config import DDPOConfig
from ddpo_trl.distributed import is_sharded
from ddpo_trl.policy.policy import Policy
from ddpo_trl.policy.records import SampledBatch
from ddpo_trl.rollout.records import Rollout, Transition


logger = logging.get_logger(__name__)


def replay_problem(
    policy: Policy, micro_batch: Transition, log_probs: Tensor, batches: Sequence[SampledBatch]
) -> str | None:
    """
    Compare a replay before any update with sampling, and describe the mismatch with its cause.

    Args:
        policy ([`~ddpo_trl.policy.policy.Policy`]):
            The policy as training calls it.
        micro_batch ([`~ddpo_trl.rollout.records.Transition`] of length `B`):
            The replayed micro-batch.
        log_probs (`torch.Tensor` of shape `(B,)`):
            The replayed log-probabilities.
        batches (`Sequence[SampledBatch]` of length `B`):
            The batch in which each sample was drawn.

    Returns:
        `str`: The error message, or `None` if the difference is within tolerance.
    """
    difference = log_prob_difference(policy.settings, log_probs, micro_batch.log_probs, micro_batch.latents)
    if difference <= FLOAT32_TOLERANCE:  # and not a NaN
        return None
    worst = int((log_probs - micro_batch.log_probs).abs().argmax())
    mismatch = Mismatch(policy=policy, micro_batch=micro_batch, batch=batches[worst], difference=difference)
    rounding = HALF_PRECISION_ROUNDING if is_half(policy, micro_batch) else FLOAT32_ROUNDING
    if difference <= rounding and is_rounding(mismatch):
        return None
    return (
        f"Before any update, step {micro_batch.step} has another log-probability in training than in sampling: they "
        f"differ by {difference:.2g} per latent dimension, more than {FLOAT32_TOLERANCE}. {diagnosis(mismatch)}"
    )


def is_half(policy: Policy, micro_batch: Transition) -> bool:
    """Return whether the log-probabilities are computed in half precision."""
    dtypes = {micro_batch.latents.dtype, policy.denoiser.dtype}
    return policy.settings.mixed_precision != "no" or not dtypes.isdisjoint(HALF_DTYPES)


def is_rounding(mismatch: Mismatch) -> bool:
    """Return whether the difference is rounding only: it vanishes at the batch size of sampling."""
    if is_sharded(mismatch.policy):
        return True  # unknown: one process can't replay alone
    return mismatch.difference_in_batch() <= FLOAT32_TOLERANCE


class ReplayCheck:
    """
    Compares replays before any update with sampling.

    Args:
        config ([`DDPOConfig`]):
            Settings.
    """

    def __init__(self, config: DDPOConfig):
        self.config = config
        self.warned = False

    def deviation(
        self, policy: Policy, batch: Transition, log_probs: Tensor, rollout: Rollout, is_first: bool
    ) -> Tensor:
        """
        Return the largest |ratio − 1| of replay to rollout.

        Args:
            policy ([`~ddpo_trl.policy.policy.Policy`]):
                The policy.
            batch ([`~ddpo_trl.rollout.records.Transition`]):
                The micro-batch.
            log_probs (`torch.Tensor` of shape `(B,)`):
                Its replayed log-probabilities, without gradient.
            rollout ([`~ddpo_trl.rollout.records.Rollout`]):
                The rollout it is part of.
            is_first (`bool`):
                True if there was no update in this run yet.

        Raises:
            `RuntimeError`: If the replay differs from sampling, in the first round only.
        """
        if not batch.share_counted:
            return torch.zeros_like(log_probs[0])
        if is_first:
            origins = [rollout.origin(sample) for sample in batch.samples]
            if problem := replay_problem(policy, batch, log_probs, origins):
                raise RuntimeError(problem)
        return (torch.exp(log_probs - batch.log_probs) - 1).abs().max()

    def warn_of_rounding(self, deviation: float) -> None:
        """Warn once if rounding alone causes clipping: only the first update of a round starts from ratios of 1."""
        config = self.config
        if self.warned or config.updates_per_round == 1 or deviation <= config.cliprange:
            return
        self.warned = True
        logger.warning(
            f"Replayed ratios differ from 1 by {deviation:.1e} before any update, more than cliprange "
            f"({config.cliprange:g}): in the later updates of a round, clipping depends on rounding. It vanishes if "
            f"per_device_train_batch_size ({config.per_device_train_batch_size}) is equal to "
            f"per_device_sample_batch_size ({config.per_device_sample_batch_size})."
        )

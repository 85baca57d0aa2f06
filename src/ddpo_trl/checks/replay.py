"""Whether a replay is the sampling it repeats; if not, the sentence that names the cause."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers.utils import logging

from ddpo_trl.checks.causes import CHANGED_SUSPECTS, LOOP_SUSPECTS, RANDOM_SUSPECTS, Suspect
from ddpo_trl.checks.trial import (
    FLOAT32_ROUNDING,
    FLOAT32_TOLERANCE,
    HALF_DTYPES,
    HALF_PRECISION_ROUNDING,
    Trial,
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
    The sentence, with its cause, for a replay before any update that is not the sampling it repeats.

    Args:
        policy ([`~ddpo_trl.policy.policy.Policy`]):
            As training calls it.
        micro_batch ([`~ddpo_trl.rollout.records.Transition`] of length `B`):
            What was replayed.
        log_probs (`torch.Tensor` of shape `(B,)`):
            The replayed log-probabilities.
        batches (`Sequence[SampledBatch]` of length `B`):
            The batch in which each sample was drawn.

    Returns:
        `None` if the difference is within tolerance.
    """
    difference = log_prob_difference(policy.settings, log_probs, micro_batch.log_probs, micro_batch.latents)
    if difference <= FLOAT32_TOLERANCE:  # and not a NaN
        return None
    worst = int((log_probs - micro_batch.log_probs).abs().argmax())
    trial = Trial(policy=policy, micro_batch=micro_batch, batch=batches[worst], difference=difference)
    rounding = HALF_PRECISION_ROUNDING if is_half(policy, micro_batch) else FLOAT32_ROUNDING
    if difference <= rounding and trial.is_rounding():
        return None
    return (
        f"Before any update, step {micro_batch.step} has another log-probability in training than in sampling: they "
        f"differ by {difference:.2g} per latent dimension, more than {FLOAT32_TOLERANCE}. {diagnosis(trial)}"
    )


def is_half(policy: Policy, micro_batch: Transition) -> bool:
    """Whether half precision has a part in the log-probabilities."""
    dtypes = {micro_batch.latents.dtype, policy.denoiser.dtype}
    return policy.settings.mixed_precision != "no" or not dtypes.isdisjoint(HALF_DTYPES)


def diagnosis(trial: Trial) -> str:
    """The cause, and the remedy where there is one; or what was ruled out."""
    if is_sharded(trial.policy):
        return (
            "The cause was not looked for: with sharded weights one process can't replay alone. Ask `ddpo-trl "
            "doctor`, or start the run on one process."
        )
    if (spread := trial.spread_of(trial.replay)) > FLOAT32_TOLERANCE:
        trial.spread = spread
    suspects = RANDOM_SUSPECTS if trial.spread else CHANGED_SUSPECTS
    acquitted: list[str] = []
    if cause := first_cause(trial, suspects, acquitted):
        return cause
    if trial.spread:
        what = "Two replays of it differ from each other: the pipeline has a source of randomness, maybe a hook"
    elif trial.repeats_itself():
        what = "Sampled and replayed anew it does not differ: something has changed since it was sampled"
    elif cause := first_cause(trial, LOOP_SUSPECTS, acquitted):
        return cause
    else:
        what = "Sampling anew and replaying differ as well: in the pipeline they are not the same"
    return f"{what}. The cause was not found. Ruled out: {', '.join(acquitted)}."


def first_cause(trial: Trial, suspects: Mapping[str, Suspect], acquitted: list[str]) -> str | None:
    """What the first suspect that explains the difference says; the others are added to `acquitted`."""
    for name, suspect in suspects.items():
        try:
            if cause := suspect(trial):
                return f"The cause is {cause}"
            acquitted.append(name)
        except Exception as error:  # a pipeline may not bear the trial, and that must not hide the finding
            acquitted.append(f"{name} (not tried: {type(error).__name__})")
    return None


class ReplayCheck:
    """
    Compares replays before any update with the sampling they repeat.

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
        Largest |ratio − 1| of replay to rollout.

        Args:
            policy ([`~ddpo_trl.policy.policy.Policy`]):
                The policy.
            batch ([`~ddpo_trl.rollout.records.Transition`]):
                The micro-batch.
            log_probs (`torch.Tensor` of shape `(B,)`):
                Its replayed log-probabilities, without gradient.
            rollout ([`~ddpo_trl.rollout.records.Rollout`]):
                Where it comes from.
            is_first (`bool`):
                Whether no update was made in this run yet.

        Raises:
            `RuntimeError`: If the replay is another policy than was sampled, in the first round only.
        """
        if not batch.share_counted:
            return torch.zeros_like(log_probs[0])
        if is_first:
            origins = [rollout.origin(sample) for sample in batch.samples]
            if problem := replay_problem(policy, batch, log_probs, origins):
                raise RuntimeError(problem)
        return (torch.exp(log_probs - batch.log_probs) - 1).abs().max()

    def warn_of_rounding(self, deviation: float) -> None:
        """Warns once if rounding alone clips: the first update starts from ratios of 1, those after it do not."""
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

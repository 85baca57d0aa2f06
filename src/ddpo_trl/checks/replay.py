"""Whether a replay is the sampling it repeats; if not, the sentence that names the cause."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from ddpo_trl.checks.causes import CHANGED_SUSPECTS, LOOP_SUSPECTS, RANDOM_SUSPECTS, Suspect
from ddpo_trl.checks.trial import (
    FLOAT32_ROUNDING,
    FLOAT32_TOLERANCE,
    HALF_DTYPES,
    HALF_PRECISION_ROUNDING,
    Trial,
    log_prob_difference,
)
from ddpo_trl.distributed import is_sharded
from ddpo_trl.policy.policy import Policy
from ddpo_trl.policy.records import SampledBatch
from ddpo_trl.rollout.records import Transition


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

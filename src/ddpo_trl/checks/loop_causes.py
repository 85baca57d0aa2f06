"""Causes of a mismatch in the sampling loop itself, although nothing has changed since sampling: one function each."""

from collections.abc import Mapping
from contextlib import suppress

import torch

from ddpo_trl.checks.causes import Cause
from ddpo_trl.checks.mismatch import (
    HALF_DTYPES,
    Mismatch,
    hooked_modules,
    sampled_and_replayed_again,
    without_hooks,
    without_option,
)
from ddpo_trl.checks.wording import listed, plain


def scheduler(mismatch: Mismatch) -> str | None:
    """Check for a scheduler that computes a step differently in sampling and in replay."""
    sampling, replay = sampled_and_replayed_again(mismatch)
    same_input = torch.equal(sampling.latents, replay.latents) and torch.equal(
        sampling.model_output, replay.model_output
    )
    if not same_input or torch.equal(sampling.mean, replay.mean):
        return None
    precisions = [
        f": it computes in {plain(dtype)} in {when}"
        for when, mean in (("sampling", sampling.mean), ("training", replay.mean))
        for dtype in HALF_DTYPES
        if torch.equal(mean.to(dtype).float(), mean.float())
    ]
    return (
        "the scheduler: for the same latents and prediction it computes another mean in sampling than in "
        f"training{''.join(precisions[:1])}. It must compute in float32 in both."
    )


def position(mismatch: Mismatch) -> str | None:
    """Check for an option that depends on the position in the loop; a replayed step is the first of its loop."""
    options = mismatch.policy.pipeline_kwargs
    for name in list(options):
        agree = False
        with suppress(Exception):  # the pipeline may require the option
            agree = mismatch.vanishes_when_resampled(without_option(options, name))
        if agree:
            return (
                f"{name} in pipeline_kwargs: without it sampling and replay agree. It depends on the position in the "
                "loop, but each trained step is replayed as the first of its loop. Remove it."
            )
    return None


def hooks(mismatch: Mismatch) -> str | None:
    """Check for a forward hook that acts differently in sampling and in replay."""
    modules = hooked_modules(mismatch.policy)
    if not modules or not mismatch.vanishes_when_resampled(without_hooks(mismatch.policy)):
        return None
    return (
        f"a forward hook: without the hooks on {listed(modules)} sampling and replay agree. It may count calls, or "
        "carry state from one step to the next."
    )


def loop(mismatch: Mismatch) -> str | None:
    """Check for a prediction that depends on earlier steps, without an option or a hook as its cause."""
    sampling, replay = sampled_and_replayed_again(mismatch)
    if not torch.equal(sampling.latents, replay.latents) or torch.equal(sampling.model_output, replay.model_output):
        return None
    return (
        "something that depends on the position in the loop: for the same latents the denoiser makes another "
        "prediction during sampling than in replay. Look for a cache across steps, or guidance in some steps only."
    )


LOOP_CAUSES: Mapping[str, Cause] = {
    "scheduler arithmetic": scheduler,
    "pipeline_kwargs": position,
    "forward hooks": hooks,
    "position in the loop": loop,
}

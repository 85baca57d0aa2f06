"""Possible causes of a mismatch between sampling and replay, one short function each.

Each function replays the transition with one condition changed, without gradients. It returns a sentence if the
difference vanishes, and `None` otherwise. State that can't be restored, because only a fingerprint of it was kept,
is the cause if its fingerprint has changed.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ddpo_trl.checks.mismatch import (
    HALF_DTYPES,
    REPEATED,
    Mismatch,
    autocast_as,
    hooked_modules,
    in_evaluation_mode,
    is_dropout,
    named_modules,
    observed_transitions,
    settings_of_sampling,
    without_dropout,
    without_hooks,
)
from ddpo_trl.checks.wording import listed, plain, setting_name, verb
from ddpo_trl.policy.fingerprint import changed_weights, settings_in_use
from ddpo_trl.policy.policy import Policy
from ddpo_trl.policy.values import is_setting
from ddpo_trl.seeding import forked_generators


Cause = Callable[[Mismatch], str | None]


def training_mode(mismatch: Mismatch) -> str | None:
    """Check for a module in training mode: its dropout or batch statistics differ from sampling."""
    modules = [name for name, module in named_modules(mismatch.policy) if module.training and is_dropout(module)]
    modules = modules or [name for name, module in named_modules(mismatch.policy) if module.training]
    if not modules or not mismatch.vanishes_under(in_evaluation_mode(mismatch.policy)):
        return None
    return (
        f"training mode: {listed(modules)} {verb(modules)} in it, and in evaluation mode the difference vanishes. "
        "The trainer keeps the pipeline in evaluation mode; find the code that calls `.train()` on it."
    )


def dropout(mismatch: Mismatch) -> str | None:
    """Check for dropout that stays active in evaluation mode, because a hook or the pipeline calls `.train()`."""
    modules = [name for name, module in named_modules(mismatch.policy) if is_dropout(module)]
    if not modules or not mismatch.vanishes_under(without_dropout(mismatch.policy)):
        return None
    return (
        f"dropout: {listed(modules)} {verb(modules)} active although the trainer sets evaluation mode, and with p=0 "
        "the difference vanishes. A hook or the pipeline itself switches to training mode; set dropout to 0."
    )


def random_hooks(mismatch: Mismatch) -> str | None:
    """Check for a forward hook that draws random numbers."""
    modules = hooked_modules(mismatch.policy)
    if not modules or not mismatch.vanishes_under(without_hooks(mismatch.policy)):
        return None
    return (
        f"randomness in a forward hook: without the hooks on {listed(modules)} two replays agree. Remove the hook, or "
        "make it deterministic."
    )


def global_generator(mismatch: Mismatch) -> str | None:
    """Check for random numbers from torch's global generator instead of the `generator` given to the pipeline."""

    def replay_from_the_same_seed() -> Tensor:
        torch.manual_seed(0)
        return mismatch.replay()

    with forked_generators(mismatch.micro_batch.latents.device):
        if mismatch.spread_of(replay_from_the_same_seed) > REPEATED * mismatch.spread:
            return None
    return (
        "randomness from torch's global generator: with the same seed two replays agree. Something in the pipeline "
        "draws from it instead of from the `generator` argument."
    )


def gradients(mismatch: Mismatch) -> str | None:
    """Check for code that behaves differently while gradients are computed."""
    with torch.no_grad():
        if not mismatch.has_vanished(mismatch.distance(mismatch.replay_micro_batch(), mismatch.micro_batch.log_probs)):
            return None
    with torch.enable_grad():
        if mismatch.has_vanished(mismatch.distance(mismatch.replay_micro_batch(), mismatch.micro_batch.log_probs)):
            return "not reproducible: the difference vanished when the same transition was replayed again."
    return (
        "the computation with gradients enabled: without gradients the difference vanishes. Try again without "
        "gradient_checkpointing, or with another attention processor."
    )


def micro_batch(mismatch: Mismatch) -> str | None:
    """Check for another batch size than in sampling, or a pipeline that mixes the samples of a batch."""
    if is_same_batch(mismatch) or not mismatch.vanishes_under(nullcontext()):
        return None
    config = mismatch.policy.settings
    sizes = (
        f"per_device_train_batch_size={config.per_device_train_batch_size} against "
        f"per_device_sample_batch_size={config.per_device_sample_batch_size}"
    )
    found = f"the micro-batch: replayed in its batch of sampling the difference vanishes ({sizes})."
    if mixes_samples(mismatch):
        return (
            f"{found} The pipeline mixes the samples of a batch: the result of a sample depends on the other samples. "
            "Set both to 1, or remove the code that mixes them (a hook?)."
        )
    return f"{found} Batches of different sizes are computed by different kernels: set both to the same value."


def autocast(mismatch: Mismatch) -> str | None:
    """Check for another autocast precision than in sampling."""
    with autocast_as(mismatch):
        # Bypass the Trainer's wrapper around the policy's `forward`, which opens its own autocast.
        replayed = mismatch.replay(lambda *args: Policy.forward(mismatch.policy, *args))
    if not mismatch.has_vanished(mismatch.distance(replayed, mismatch.recorded.log_probs)):
        return None
    dtype = mismatch.fingerprint.autocast
    sampling = "without autocast" if dtype is None else f"under autocast to {plain(dtype)}"
    return (
        f"autocast: sampling ran {sampling} and training does not; with the same autocast the difference vanishes. "
        "Set the precision by bf16=True or fp16=True, which apply to both."
    )


def settings(mismatch: Mismatch) -> str | None:
    """Check for guidance or another sampler setting that was changed after sampling."""
    before, now = mismatch.fingerprint.settings, settings_in_use(mismatch.policy.runner.setting_owners)
    changes = [
        f"{setting_name(owner, name)} was {before[owner].get(name)!r} in sampling and is {now[owner].get(name)!r}"
        for owner in before
        for name in before[owner].keys() | now[owner].keys()
        if not is_same(before[owner].get(name), now[owner].get(name))
    ]
    if not changes or not mismatch.vanishes_under(settings_of_sampling(mismatch)):
        return None
    return (
        f"a changed setting: {'; '.join(sorted(changes))} in training. With the old value the difference vanishes. "
        "Don't change settings between the sampling and the training of a round."
    )


def state(mismatch: Mismatch) -> str | None:
    """Check for a pipeline that rounds or changes the latents passed to it."""
    with observed_transitions(mismatch) as seen:
        mismatch.replay()
    given, arrived = mismatch.recorded.latents.float(), torch.cat([each.latents for each in seen])  # one per call
    if arrived.numel() == given.numel():  # by frame, where the pipeline steps frames
        arrived = arrived.reshape(given.shape)
        if torch.equal(arrived, given):
            return None
    rounding = [plain(dtype) for dtype in HALF_DTYPES if torch.equal(given.to(dtype).float(), arrived)]
    if rounding:
        return (
            f"the dtype of the latents: the pipeline casts them to {rounding[0]} before they reach the scheduler. "
            "Load the whole pipeline in one dtype."
        )
    if arrived.shape != given.shape:
        what = f"passes latents of shape {tuple(arrived.shape)} to the scheduler instead of {tuple(given.shape)}"
    else:
        what = f"changes {int((arrived != given).sum())} of {given.numel()} values before they reach the scheduler"
    return (
        f"the latents: the pipeline {what}. It may scale or round them, or overwrite part of them with noise or an "
        "encoded image before each step; look for such an option in pipeline_kwargs."
    )


def embeddings(mismatch: Mismatch) -> str | None:
    """Check for prompt embeddings that changed after sampling."""
    before = mismatch.fingerprint.embeddings
    now = mismatch.policy.runner.embedding_sums(mismatch.batch.context)
    if len(before) == len(now) and all(map(torch.equal, before, now)):
        return None
    return (
        "the prompt embeddings: they have changed since sampling. Something writes into the tensors that "
        "`encode_prompt` returned, or has changed a text encoder."
    )


def adapter(mismatch: Mismatch) -> str | None:
    """Check for adapters that were enabled, disabled, merged or scaled after sampling."""
    before, now = mismatch.fingerprint.adapter, mismatch.policy.runner.fingerprint(None).adapter
    if before == now:
        return None
    changed = len(before) - sum(old == new for old, new in zip(before, now, strict=False))
    return (
        f"the adapter: {changed} of its {len(before)} layers were enabled, disabled, merged or scaled between "
        "sampling and training. Find the callback that does this, and make it restore the adapter."
    )


def weights(mismatch: Mismatch) -> str | None:
    """Check for trained weights that changed after sampling."""
    before, now = mismatch.fingerprint, mismatch.policy.runner.fingerprint(None)
    if before.denoiser_dtype != now.denoiser_dtype:
        return f"the denoiser's dtype: {plain(before.denoiser_dtype)} in sampling, {plain(now.denoiser_dtype)} now."
    changed = changed_weights(mismatch.policy.denoiser, before)
    if not changed:
        return None
    return (
        f"changed weights: {len(changed)} of the {len(before.weights)} trained parameters have changed since sampling "
        f"({listed(changed)}). Something, such as a callback, writes to them between sampling and training."
    )


RANDOM_CAUSES: Mapping[str, Cause] = {
    "training mode": training_mode,
    "dropout": dropout,
    "forward hooks": random_hooks,
    "torch's global generator": global_generator,
}

# Causes that can be undone and tested come before those known by a fingerprint only: they are better evidence.
CHANGED_CAUSES: Mapping[str, Cause] = {
    "gradient mode": gradients,
    "micro-batch size": micro_batch,
    "training mode": training_mode,
    "autocast": autocast,
    "guidance and other settings": settings,
    "dtype of the latents": state,
    "prompt embeddings": embeddings,
    "adapter switches": adapter,
    "trained weights": weights,
}


def is_same_batch(mismatch: Mismatch) -> bool:
    """Return whether training replayed the same batch that was sampled."""
    return list(mismatch.micro_batch.context.seeds) == list(mismatch.batch.context.seeds)


def mixes_samples(mismatch: Mismatch) -> bool:
    """Return whether the result of a sample depends on the rest of its batch, by replaying it among its own copies."""
    step, context = mismatch.recorded, mismatch.batch.context
    rows = [0] * len(context)
    copies = context.rows(rows)
    with torch.no_grad():
        replayed = mismatch.policy(mismatch.micro_batch.step, step.latents[rows], step.next_latents[rows], copies)
    return not mismatch.has_vanished(mismatch.distance(replayed.log_probs, step.log_probs[rows]))


def is_same(before: Any, now: Any) -> bool:
    """Return whether a setting is unchanged. Tensors and images are compared by identity."""
    return before is now or (is_setting(before) and is_setting(now) and before == now)

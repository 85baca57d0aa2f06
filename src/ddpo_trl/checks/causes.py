"""Usual causes of a replay that differs from sampling, one function each, and a list of others to look for.

Each function states a fact that it has found out by replaying the step or by comparing the state, or returns `None`.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ddpo_trl.checks.mismatch import FLOAT32_TOLERANCE, REPLAYS, Mismatch
from ddpo_trl.distributed import is_sharded
from ddpo_trl.policy.fingerprint import changed_weights
from ddpo_trl.policy.values import is_setting


OTHERS = (
    "Look for a callback that changes frozen weights, prompt embeddings or autocast between sampling and training; "
    "for an option in pipeline_kwargs, a hook or a cache that depends on the position in the loop (a replayed step is "
    "the first of its loop); for code that rounds or changes the latents before they reach the scheduler."
)


def randomness(mismatch: Mismatch) -> str | None:
    """Check for a step that has other log-probabilities in each replay."""
    spread = mismatch.spread()
    if not spread > FLOAT32_TOLERANCE:  # a NaN is not
        return None
    networks = [
        name
        for name, network in mismatch.policy.runner.policy_pipeline.components.items()
        if isinstance(network, nn.Module) and any(module.training for module in network.modules())
    ]
    in_training = f" ({', '.join(networks)} in training mode)" if networks else ""
    return (
        f"The step is random: replayed {REPLAYS} times, its log-probabilities differ by up to {spread:.2g}. Look for "
        f"dropout{in_training}, a forward hook that draws random numbers or counts its calls, and code that draws "
        "from torch's global generator instead of the `generator` argument."
    )


def gradients(mismatch: Mismatch) -> str | None:
    """Check for code that behaves differently while gradients are computed."""
    if not mismatch.vanishes_in_micro_batch(with_gradients=False):
        return None
    if mismatch.vanishes_in_micro_batch(with_gradients=True):
        return "The difference is not reproducible: it vanished when the same transition was replayed again."
    return (
        "The cause is the computation with gradients enabled: without gradients the difference vanishes. Try again "
        "without gradient_checkpointing, or with another attention processor."
    )


def batch_size(mismatch: Mismatch) -> str | None:
    """Check for another batch than in sampling."""
    sampled, trained = mismatch.batch.context, mismatch.micro_batch.context
    if list(sampled.seeds) == list(trained.seeds) or mismatch.vanishes_in_micro_batch(with_gradients=False):
        return None
    if not mismatch.vanishes_in_batch():
        return None
    found = "The cause is the micro-batch: replayed in its batch of sampling the difference vanishes"
    if len(sampled) == len(trained):
        return (
            f"{found}, so the result of a sample depends on the other samples. Set per_device_train_batch_size and "
            "per_device_sample_batch_size to 1, or remove the code that mixes the samples of a batch (a hook?)."
        )
    return (
        f"{found} ({len(trained)} samples in training, {len(sampled)} in sampling). Set per_device_train_batch_size "
        "and per_device_sample_batch_size to the same value, or to 1 if the samples of a batch influence each other."
    )


def changes(mismatch: Mismatch) -> str | None:
    """Check for settings, trained weights and adapters that changed after sampling."""
    before, now = mismatch.batch.fingerprint, mismatch.policy.runner.fingerprint()
    assert before is not None, "Policy.sample records it"
    changed = changed_settings(before.settings, now.settings)
    if before.adapter != now.adapter:
        layers = len(before.adapter) - sum(old == new for old, new in zip(before.adapter, now.adapter, strict=False))
        changed.append(f"{layers} of the adapter's {len(before.adapter)} layers were switched, merged or scaled")
    elif weights := changed_weights(mismatch.policy.denoiser, before):
        changed.append(f"{len(weights)} of the {len(before.weights)} trained weights have new values ({weights[0]})")
    if not changed:
        return None
    return (
        f"Changed since sampling: {'; '.join(changed)}. Nothing may change between the sampling and the training of a "
        "round. Look for a callback that does this."
    )


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return each changed setting with its old and new value. Tensors and images are compared by identity."""
    return [
        f"{name} was {old!r} and is {new!r}"
        for name, old, new in ((name, before.get(name), now.get(name)) for name in sorted(before.keys() | now.keys()))
        if not (old is new or (is_setting(old) and is_setting(new) and old == new))
    ]


CAUSES: Mapping[str, Callable[[Mismatch], str | None]] = {
    "randomness": randomness,
    "gradients": gradients,
    "batch size": batch_size,
    "changed settings, trained weights or adapter": changes,
}


def diagnosis(mismatch: Mismatch) -> str:
    """Return what was found with its remedy, or else the causes that were ruled out and others to look for."""
    if is_sharded(mismatch.policy):
        return (
            "The cause was not searched: with sharded weights one process can't replay alone. Run `ddpo-trl doctor`, "
            "or start the run on one process."
        )
    found, ruled_out = [], []
    for name, check in CAUSES.items():
        try:
            if cause := check(mismatch):
                found.append(cause)
            else:
                ruled_out.append(name)
        except Exception as error:  # a check that fails must not hide the mismatch
            ruled_out.append(f"{name} (not tried: {type(error).__name__})")
    if found:
        return " ".join(found)
    return f"The cause was not found. Ruled out: {', '.join(ruled_out)}. {OTHERS}"

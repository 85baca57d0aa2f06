"""What may make replay differ from sampling, one short function each.

A suspect replays the transition under one changed condition, without gradients; it returns a sentence if the
difference vanishes under it, and `None` if it does not. What can't be put back, because only a fingerprint of it was
kept, counts as the cause if the fingerprint has changed.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch import Tensor

from ddpo_trl.checks.trial import (
    HALF_DTYPES,
    REPEATED,
    Trial,
    autocast_as,
    in_evaluation_mode,
    is_dropout,
    named_modules,
    observed_transitions,
    sampled_and_replayed_anew,
    settings_of_sampling,
    without_dropout,
    without_hooks,
    without_option,
)
from ddpo_trl.policy.fingerprint import changed_weights, settings_in_use
from ddpo_trl.policy.policy import Policy
from ddpo_trl.policy.values import is_setting
from ddpo_trl.seeding import forked_generators


MAX_NAMES = 3  # of modules in a sentence

Suspect = Callable[[Trial], str | None]


# ---- What makes two replays differ from each other, or has changed since sampling ----


def training_mode(trial: Trial) -> str | None:
    """A module that someone switched to training mode: its dropout or batch statistics."""
    culprits = [name for name, module in named_modules(trial.policy) if module.training and is_dropout(module)]
    culprits = culprits or [name for name, module in named_modules(trial.policy) if module.training]
    if not culprits or not trial.is_cured_by(in_evaluation_mode(trial.policy)):
        return None
    return (
        f"training mode: {listed(culprits)} {verb(culprits)} in it, and in evaluation mode the difference vanishes. "
        "The trainer keeps the pipeline in evaluation mode; find what calls `.train()` on it."
    )


def dropout(trial: Trial) -> str | None:
    """Dropout that evaluation mode does not end, because a hook or the pipeline switches training mode on."""
    culprits = [name for name, module in named_modules(trial.policy) if is_dropout(module)]
    if not culprits or not trial.is_cured_by(without_dropout(trial.policy)):
        return None
    return (
        f"dropout: {listed(culprits)} {verb(culprits)} active although the trainer sets evaluation mode, and with p=0 "
        "the difference vanishes. A hook or the pipeline itself switches to training mode; set the dropout to 0."
    )


def random_hooks(trial: Trial) -> str | None:
    """A forward hook that draws random numbers."""
    culprits = hooked_modules(trial.policy)
    if not culprits or not trial.is_cured_by(without_hooks(trial.policy)):
        return None
    return (
        f"randomness in a forward hook: without those on {listed(culprits)} two replays agree. Remove the hook, or "
        "let it draw no random numbers."
    )


def global_generator(trial: Trial) -> str | None:
    """Something that draws from torch's global generator, where the pipeline has generators of its own."""

    def replay_from_the_same_seed() -> Tensor:
        torch.manual_seed(0)
        return trial.replay()

    with forked_generators(trial.micro_batch.latents.device):
        if trial.spread_of(replay_from_the_same_seed) > REPEATED * trial.spread:
            return None
    return (
        "randomness from torch's global generator: with the same seed two replays agree. Something in the pipeline "
        "draws from it rather than from the `generator` that it is given."
    )


def gradients(trial: Trial) -> str | None:
    """Something that acts only while gradients are computed."""
    with torch.no_grad():
        if not trial.explains(trial.apart(trial.replay_micro_batch(), trial.micro_batch.log_probs)):
            return None
    with torch.enable_grad():
        if trial.explains(trial.apart(trial.replay_micro_batch(), trial.micro_batch.log_probs)):
            return "gone: it happened once, and replaying the same transition again does not show it."
    return (
        "what the pipeline does with gradients switched on: without them the difference vanishes. Try it without "
        "gradient_checkpointing, and with another attention processor."
    )


def micro_batch(trial: Trial) -> str | None:
    """Another batch size, or a pipeline in which the samples of a batch have to do with each other."""
    if is_same_batch(trial) or not trial.is_cured_by(nullcontext()):
        return None
    config = trial.policy.settings
    sizes = (
        f"per_device_train_batch_size={config.per_device_train_batch_size} against "
        f"per_device_sample_batch_size={config.per_device_sample_batch_size}"
    )
    found = f"the micro-batch: replayed in the batch in which it was sampled the difference vanishes ({sizes})."
    if mixes_samples(trial):
        return (
            f"{found} The pipeline mixes the samples of a batch: among others of the same number a sample gives "
            "another result. Set both to 1, or remove what mixes them (a hook?)."
        )
    return f"{found} Batches of other sizes are computed differently: set both to the same value."


def autocast(trial: Trial) -> str | None:
    """Another precision of matrix products than in sampling."""
    with autocast_as(trial):
        # Past the wrapper that the Trainer puts around the policy's `forward`, which opens another autocast.
        replayed = trial.replay(lambda *args: Policy.forward(trial.policy, *args))
    if not trial.explains(trial.apart(replayed, trial.recorded.log_probs)):
        return None
    dtype = trial.conditions.autocast
    sampling = "without autocast" if dtype is None else f"under autocast to {plain(dtype)}"
    return (
        f"autocast: sampling ran {sampling} and training does not, and with it the difference vanishes. Leave "
        "precision to bf16=True or fp16=True, which hold for both."
    )


def settings(trial: Trial) -> str | None:
    """Guidance or another setting of the sampler that was changed meanwhile."""
    before, now = trial.conditions.settings, settings_in_use(trial.policy.runner.setting_owners)
    changes = [
        f"{setting_name(owner, name)} was {before[owner].get(name)!r} in sampling and is {now[owner].get(name)!r}"
        for owner in before
        for name in before[owner].keys() | now[owner].keys()
        if not is_same(before[owner].get(name), now[owner].get(name))
    ]
    if not changes or not trial.is_cured_by(settings_of_sampling(trial)):
        return None
    return (
        f"a changed setting: {'; '.join(sorted(changes))} in training. With what it was the difference vanishes. "
        "Don't change settings between the sampling of a round and its training."
    )


def state(trial: Trial) -> str | None:
    """A pipeline that rounds or changes the latents that it is given."""
    with observed_transitions(trial) as seen:
        trial.replay()
    given, arrived = trial.recorded.latents.float(), torch.cat([each.latents for each in seen])  # one for each call
    if arrived.numel() == given.numel():  # by frame, where the pipeline steps frames
        arrived = arrived.reshape(given.shape)
        if torch.equal(arrived, given):
            return None
    rounding = [plain(dtype) for dtype in HALF_DTYPES if torch.equal(given.to(dtype).float(), arrived)]
    if rounding:
        return (
            f"the dtype of the latents: the pipeline is given the recorded ones and casts them to {rounding[0]} on "
            "the way to the scheduler. Load the whole pipeline in one dtype."
        )
    if arrived.shape != given.shape:
        what = f"hands {tuple(arrived.shape)} to the scheduler"
    else:
        what = f"changes {int((arrived != given).sum())} of their {given.numel()} numbers on the way to the scheduler"
    return (
        f"the latents: the pipeline is given the recorded ones and {what}. It may scale or round them, or put noise "
        "or an encoded image into a part of them before each step: look for such an option in pipeline_kwargs."
    )


def embeddings(trial: Trial) -> str | None:
    """Prompt embeddings that are not those of sampling."""
    before = trial.conditions.embeddings
    now = trial.policy.runner.embedding_sums(trial.batch.context)
    if len(before) == len(now) and all(map(torch.equal, before, now)):
        return None
    return (
        "the prompt embeddings: they are not those of sampling. Something writes into what `encode_prompt` returned, "
        "or has changed a text encoder."
    )


def adapter(trial: Trial) -> str | None:
    """Adapters that were switched, merged or scaled."""
    before, now = trial.conditions.adapter, trial.policy.runner.conditions(None).adapter
    if before == now:
        return None
    changed = len(before) - sum(old == new for old, new in zip(before, now, strict=False))
    return (
        f"the adapter: {changed} of its {len(before)} layers were switched on or off, merged or scaled between "
        "sampling and training. Find the callback that does it, and let it undo it."
    )


def weights(trial: Trial) -> str | None:
    """Weights that were written to."""
    before, now = trial.conditions, trial.policy.runner.conditions(None)
    if before.denoiser_dtype != now.denoiser_dtype:
        return f"the denoiser's dtype: {plain(before.denoiser_dtype)} in sampling, {plain(now.denoiser_dtype)} now."
    changed = changed_weights(trial.policy.denoiser, before)
    if not changed:
        return None
    return (
        f"changed weights: {len(changed)} of the {len(before.weights)} trained ones are not those that sampled "
        f"({listed(changed)}). Something, such as a callback, writes to them between sampling and training."
    )


# ---- What makes sampling and replay differ although nothing has changed ----


def scheduler(trial: Trial) -> str | None:
    """A scheduler that computes a step in another way in sampling than in replay."""
    sampling, replay = sampled_and_replayed_anew(trial)
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
        "the scheduler: from the same latents and the same prediction it makes another mean in sampling than in "
        f"training{''.join(precisions[:1])}. Its arithmetic has to be the same, and float32, in both."
    )


def position(trial: Trial) -> str | None:
    """An option that acts by the position in the loop; a replayed step is the first of its loop."""
    options = trial.policy.pipeline_kwargs
    for name in list(options):
        agree = False
        with suppress(Exception):  # the pipeline may need it
            agree = trial.repeats_itself(without_option(options, name))
        if agree:
            return (
                f"{name} in pipeline_kwargs: without it sampling and replay agree. It acts by the position in the "
                "loop, and a step that is trained on is replayed as the first of its loop. Leave it out."
            )
    return None


def hooks(trial: Trial) -> str | None:
    """A forward hook that acts differently in sampling and in replay."""
    culprits = hooked_modules(trial.policy)
    if not culprits or not trial.repeats_itself(without_hooks(trial.policy)):
        return None
    return (
        f"a forward hook: without those on {listed(culprits)} sampling and replay agree. It may count calls, or keep "
        "something from one step for the next."
    )


def loop(trial: Trial) -> str | None:
    """A prediction that depends on what ran before, without an option or a hook that explains it."""
    sampling, replay = sampled_and_replayed_anew(trial)
    if not torch.equal(sampling.latents, replay.latents) or torch.equal(sampling.model_output, replay.model_output):
        return None
    return (
        "something that acts by the position in the loop: for the same latents the denoiser predicts something else "
        "in the course of sampling than alone. Look for a cache over steps, or guidance that some steps only get."
    )


RANDOM_SUSPECTS: Mapping[str, Suspect] = {
    "training mode": training_mode,
    "dropout": dropout,
    "forward hooks": random_hooks,
    "torch's global generator": global_generator,
}

# Those that are put back and tried come before those that are told by a fingerprint: theirs is the better evidence.
CHANGED_SUSPECTS: Mapping[str, Suspect] = {
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

LOOP_SUSPECTS: Mapping[str, Suspect] = {
    "scheduler arithmetic": scheduler,
    "pipeline_kwargs": position,
    "forward hooks": hooks,
    "position in the loop": loop,
}


# ---- Modules and words ----


def hooked_modules(policy: Policy) -> list[str]:
    """Names of the modules with forward hooks."""
    return [name for name, module in named_modules(policy) if module._forward_hooks or module._forward_pre_hooks]


def is_same_batch(trial: Trial) -> bool:
    """Whether training replayed the very batch that was sampled."""
    return list(trial.micro_batch.context.seeds) == list(trial.batch.context.seeds)


def mixes_samples(trial: Trial) -> bool:
    """Whether the result of a sample depends on the others of its batch: it is tried among copies of itself."""
    step, context = trial.recorded, trial.batch.context
    rows = [0] * len(context)
    copies = context.rows(rows)
    with torch.no_grad():
        replayed = trial.policy(trial.micro_batch.step, step.latents[rows], step.next_latents[rows], copies)
    return not trial.explains(trial.apart(replayed.log_probs, step.log_probs[rows]))


def is_same(before: Any, now: Any) -> bool:
    """Whether a setting is what it was; tensors and images can't be compared and are, unless they were replaced."""
    return before is now or (is_setting(before) and is_setting(now) and before == now)


def setting_name(owner: str, name: str) -> str:
    """What a user knows a setting by: a field's name for one of the config."""
    match owner:
        case "config":
            return name
        case "pipeline_kwargs":
            return f"pipeline_kwargs[{name!r}]"
        case _:
            return f"{owner}.{name}"


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    rest = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + rest


def verb(names: Sequence[str]) -> str:
    """`"is"` or `"are"`, for a sentence with [`listed`]."""
    return "is" if len(names) == 1 else "are"


def plain(dtype: torch.dtype) -> str:
    """`"bfloat16"` for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")

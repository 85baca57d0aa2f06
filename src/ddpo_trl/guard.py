"""
The on-policy guard: before any update a replayed step has the log-probability it was sampled with, or its cause is
named.

The cause is found by trial. Each suspect is a short function that replays the transition under one changed condition,
without gradients; it returns a sentence if the difference vanishes under it, and `None` if it does not. What can't be
put back, because only a fingerprint of it was kept, counts as the cause if the fingerprint has changed.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ddpo_trl.conditions import settings_in_use
from ddpo_trl.config import DDPOConfig
from ddpo_trl.encoding import is_setting
from ddpo_trl.policy import Policy
from ddpo_trl.processes import is_sharded
from ddpo_trl.types import Conditions, Context, SampledBatch, Step, Transition


# How far a log-probability, averaged over dimensions, may move between sampling and training before any update. At the
# batch size of sampling it does not move at all, in half precision neither. Other kernels, which another micro-batch
# size or autograd may choose, move it by about 1e-6 in float32 and by up to 4e-3 in bfloat16, where the last steps are
# the most sensitive; a fault like another guidance by 1e-3 to 10. So a difference between these two is accepted in
# half precision, but only if it vanishes at the batch size of sampling.
FLOAT32_TOLERANCE = 1e-3
HALF_PRECISION_TOLERANCE = 0.1

# A condition under which so little of the difference is left is its cause.
VANISHED = 0.1

# So many replays are compared to tell whether they differ from each other. A source of randomness is found if without
# it they agree up to this part of what they differed by: by chance they would not agree so well.
REPLAYS = 4
REPEATED = 0.01

HALF_DTYPES = (torch.bfloat16, torch.float16)
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
MAX_NAMES = 3  # of modules in a sentence


def log_prob_difference(config: DDPOConfig, replayed: Tensor, recorded: Tensor, latents: Tensor) -> float:
    """Largest difference between `(B,)` log-probabilities, in nats per latent dimension."""
    dimensions = latents[0].numel() if config.log_prob_reduction == "sum" else 1
    return (replayed - recorded).abs().max().item() / dimensions


def replay_problem(
    policy: Policy, micro_batch: Transition, log_probs: Tensor, batches: Sequence[SampledBatch]
) -> str | None:
    """
    The sentence, with its cause, for a replay before any update that is not the sampling it repeats.

    Args:
        policy ([`~ddpo_trl.policy.Policy`]):
            As training calls it.
        micro_batch ([`~ddpo_trl.types.Transition`] of length `B`):
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
    if is_half(policy, micro_batch) and difference <= HALF_PRECISION_TOLERANCE and trial.is_rounding():
        return None
    return (
        f"Before any update, step {micro_batch.step} has another log-probability in training than in sampling: they "
        f"differ by {difference:.2g} per latent dimension, more than {FLOAT32_TOLERANCE}. {trial.diagnosis()}"
    )


def is_half(policy: Policy, micro_batch: Transition) -> bool:
    """Whether half precision has a part in the log-probabilities."""
    dtypes = {micro_batch.latents.dtype, policy.denoiser.dtype}
    return policy.settings.mixed_precision != "no" or not dtypes.isdisjoint(HALF_DTYPES)


@dataclass(kw_only=True)
class Trial:
    """
    A transition whose replay has another log-probability than was recorded, to be replayed under other conditions.

    Args:
        policy ([`~ddpo_trl.policy.Policy`]):
            As training calls it.
        micro_batch ([`~ddpo_trl.types.Transition`]):
            As training replayed it.
        batch ([`~ddpo_trl.types.SampledBatch`]):
            In which its worst sample was drawn. Suspects replay the whole of it, so that its size and composition are
            no further difference.
        difference (`float`):
            What is to be explained, nats per latent dimension.

    Attributes:
        spread (`float`):
            How far replays of it differ from each other, if that is what is to be explained; else 0.
    """

    policy: Policy
    micro_batch: Transition
    batch: SampledBatch
    difference: float
    spread: float = 0.0

    @property
    def recorded(self) -> Step:
        return self.batch.steps[self.micro_batch.step].to(self.micro_batch.latents.device)

    @property
    def conditions(self) -> Conditions:
        """Those of sampling."""
        assert self.batch.conditions is not None, "Policy.sample puts them there"
        return self.batch.conditions

    def replay(self, run: Callable[..., Any] | None = None) -> Tensor:
        """Log-probabilities of the batch as it was sampled, by `policy` or by another way to call it."""
        step = self.recorded
        with torch.no_grad():
            output = (run or self.policy)(self.micro_batch.step, step.latents, step.next_latents, self.batch.context)
        return output.log_probs

    def replay_micro_batch(self) -> Tensor:
        """Log-probabilities of the micro-batch, with gradients if they are on."""
        batch = self.micro_batch
        return self.policy(batch.step, batch.latents, batch.next_latents, batch.context).log_probs.detach()

    def apart(self, left: Tensor, right: Tensor) -> float:
        """Largest difference between two results, in the unit of `difference`."""
        return log_prob_difference(self.policy.settings, left, right, self.micro_batch.latents)

    def explains(self, left: float) -> bool:
        """Whether little enough of the difference is left."""
        return left <= VANISHED * self.difference  # and not a NaN

    def is_cured_by(self, condition: AbstractContextManager) -> bool:
        """Whether the difference vanishes under a condition."""
        with condition:
            if self.spread:
                return self.spread_of(self.replay) <= REPEATED * self.spread
            return self.explains(self.apart(self.replay(), self.recorded.log_probs))

    def spread_of(self, replay: Callable[[], Tensor]) -> float:
        """How far some replays differ from the first; two alone may agree by chance."""
        first = replay()
        return max(self.apart(replay(), first) for _ in range(REPLAYS - 1))

    def repeats_itself(self, condition: AbstractContextManager | None = None) -> bool:
        """Whether the batch, sampled and replayed anew under a condition, does not differ as it does now."""
        with condition or nullcontext():
            with autocast_as(self):
                context, stochastic = self.batch.context, self.conditions.stochastic
                fresh = self.policy.sample(context, record=[self.micro_batch.step], stochastic=stochastic)
            trial = Trial(policy=self.policy, micro_batch=self.micro_batch, batch=fresh, difference=self.difference)
            return self.explains(self.apart(trial.replay(), trial.recorded.log_probs))

    def is_rounding(self) -> bool:
        """Whether the difference is no more than rounding: it is not there at the batch size of sampling."""
        if is_sharded(self.policy):
            return True  # unknown: nothing can be replayed
        return self.apart(self.replay(), self.recorded.log_probs) <= FLOAT32_TOLERANCE

    def diagnosis(self) -> str:
        """The cause, and the remedy where there is one; or what was ruled out."""
        if is_sharded(self.policy):
            return (
                "The cause was not looked for: with sharded weights one process can't replay alone. Ask `ddpo-trl "
                "doctor`, or start the run on one process."
            )
        if not torch.isfinite(self.micro_batch.log_probs).all():
            return "The cause is an overflow in sampling: log-probabilities are not finite. Try bfloat16 or float32."
        if (spread := self.spread_of(self.replay)) > FLOAT32_TOLERANCE:
            self.spread = spread
        suspects = RANDOM_SUSPECTS if self.spread else CHANGED_SUSPECTS
        acquitted: list[str] = []
        if cause := self._first_cause(suspects, acquitted):
            return cause
        if self.spread:
            what = "Two replays of it differ from each other: the pipeline has a source of randomness, maybe a hook"
        elif self.repeats_itself():
            what = "Sampled and replayed anew it does not differ: something has changed since it was sampled"
        elif cause := self._first_cause(LOOP_SUSPECTS, acquitted):
            return cause
        else:
            what = "Sampling anew and replaying differ as well: in the pipeline they are not the same"
        return f"{what}. The cause was not found. Ruled out: {', '.join(acquitted)}."

    def _first_cause(self, suspects: "Mapping[str, Suspect]", acquitted: list[str]) -> str | None:
        for name, suspect in suspects.items():
            try:
                if cause := suspect(self):
                    return f"The cause is {cause}"
                acquitted.append(name)
            except Exception as error:  # a pipeline may not bear the trial, and that must not hide the finding
                acquitted.append(f"{name} (not tried: {type(error).__name__})")
        return None


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

    with forked_generators(trial):
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
    before, now = trial.conditions.settings, settings_in_use(trial.policy.setting_owners)
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
    given, arrived = trial.recorded.latents.float(), seen[0].latents
    if arrived.shape == given.shape and torch.equal(arrived, given):
        return None
    rounding = [plain(dtype) for dtype in HALF_DTYPES if torch.equal(given.to(dtype).float(), arrived)]
    what = f"casts them to {rounding[0]}" if rounding else "changes them"
    return (
        f"the dtype or scale of the latents: the pipeline is given the recorded ones and {what} on the way to the "
        "scheduler. Load the whole pipeline in one dtype, and let it leave its latents alone."
    )


def embeddings(trial: Trial) -> str | None:
    """Prompt embeddings that are not those of sampling."""
    trial.replay()
    before = trial.conditions.embeddings
    now = trial.policy.conditions(None).embeddings
    if len(before) == len(now) and all(map(torch.equal, before, now)):
        return None
    return (
        "the prompt embeddings: they are not those of sampling. Something writes into what `encode_prompt` returned, "
        "or has changed a text encoder."
    )


def adapter(trial: Trial) -> str | None:
    """Adapters that were switched, merged or scaled."""
    before, now = trial.conditions.adapter, trial.policy.conditions(None).adapter
    if before == now:
        return None
    changed = len(before) - sum(old == new for old, new in zip(before, now, strict=False))
    return (
        f"the adapter: {changed} of its {len(before)} layers were switched on or off, merged or scaled between "
        "sampling and training. Find the callback that does it, and let it undo it."
    )


def weights(trial: Trial) -> str | None:
    """Weights that were written to."""
    before, now = trial.conditions, trial.policy.conditions(None)
    if before.denoiser_dtype != now.denoiser_dtype:
        return f"the denoiser's dtype: {plain(before.denoiser_dtype)} in sampling, {plain(now.denoiser_dtype)} now."
    changed = [name for name in before.weights if name not in now.weights or before.weights[name] != now.weights[name]]
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


# ---- Conditions ----


@contextmanager
def in_evaluation_mode(policy: Policy) -> Iterator[None]:
    """All networks of the pipeline in evaluation mode."""
    before = [(module, module.training) for _, module in named_modules(policy)]
    try:
        for module, _ in before:
            module.training = False
        yield
    finally:
        for module, training in before:
            module.training = training


@contextmanager
def without_dropout(policy: Policy) -> Iterator[None]:
    """All dropout with probability 0."""
    dropouts: list[Any] = [module for _, module in named_modules(policy) if is_dropout(module)]
    before = [module.p for module in dropouts]
    try:
        for module in dropouts:
            module.p = 0.0
        yield
    finally:
        for module, p in zip(dropouts, before, strict=True):
            module.p = p


@contextmanager
def without_hooks(policy: Policy) -> Iterator[None]:
    """All networks in evaluation mode and without their forward hooks, one of which may switch the mode."""
    registries = [
        registry
        for _, module in named_modules(policy)
        for registry in (module._forward_hooks, module._forward_pre_hooks)
        if registry
    ]
    before = [OrderedDict(registry) for registry in registries]
    with in_evaluation_mode(policy):
        try:
            for registry in registries:
                registry.clear()
            yield
        finally:
            for registry, entries in zip(registries, before, strict=True):
                registry.update(entries)


def forked_generators(trial: Trial) -> AbstractContextManager:
    """Puts torch's global generators back at the end."""
    device = trial.micro_batch.latents.device
    if device.type == "cpu":
        return torch.random.fork_rng([])
    return torch.random.fork_rng([device], device_type=device.type)


def autocast_as(trial: Trial) -> torch.autocast:
    """The autocast of sampling."""
    dtype = trial.conditions.autocast
    return torch.autocast(trial.micro_batch.latents.device.type, dtype=dtype, enabled=dtype is not None)


@contextmanager
def settings_of_sampling(trial: Trial) -> Iterator[None]:
    """The settings as they were in sampling."""
    owners = trial.policy.setting_owners
    now = settings_in_use(owners)
    before = trial.conditions.settings
    try:
        for owner, values in before.items():
            put(owners[owner], old=now[owner], new=values)
        yield
    finally:
        for owner, values in before.items():
            put(owners[owner], old=values, new=now[owner])


def put(owner: dict[str, Any], old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Replaces some entries of a dictionary, in place."""
    for name in old.keys() - new.keys():
        del owner[name]
    owner.update(new)


@contextmanager
def without_option(options: dict[str, Any], name: str) -> Iterator[None]:
    """The pipeline's default in place of one of its further arguments."""
    before = dict(options)
    try:
        del options[name]
        yield
    finally:
        options.clear()
        options.update(before)


# ---- What the scheduler sees ----


class Observation(NamedTuple):
    """
    One step of the scheduler, all of shape `(B, ...)`.

    Args:
        latents, model_output (`torch.Tensor`):
            What it was given: x_t and the prediction.
        mean (`torch.Tensor`):
            What it made of them.
    """

    latents: Tensor
    model_output: Tensor
    mean: Tensor


@contextmanager
def observed_transitions(trial: Trial) -> Iterator[list[Observation]]:
    """Collects what the scheduler does with the step of the trial."""
    scheduler: Any = trial.policy.scheduler
    transition = scheduler.transition
    own = vars(scheduler).copy()
    seen: list[Observation] = []

    def observe(model_output: Tensor, index: int, latents: Tensor, stochastic: bool) -> tuple[Tensor, float]:
        mean, std = transition(model_output, index, latents, stochastic)
        if index == scheduler._skipped + trial.micro_batch.step:
            seen.append(Observation(latents, model_output, mean))
        return mean, std

    try:
        vars(scheduler)["transition"] = observe
        yield seen
    finally:
        if "transition" in own:
            vars(scheduler)["transition"] = own["transition"]
        else:
            del vars(scheduler)["transition"]


def sampled_and_replayed_anew(trial: Trial) -> list[Observation]:
    """The step of the trial in the course of sampling, and replayed."""
    with observed_transitions(trial) as seen:
        trial.repeats_itself()
    return seen


# ---- Modules and words ----


def named_modules(policy: Policy) -> list[tuple[str, nn.Module]]:
    """All modules of all networks of the pipeline, by component and name."""
    return [
        (f"{component}.{name}" if name else component, module)
        for component, network in policy.policy_pipeline.components.items()
        if isinstance(network, nn.Module)
        for name, module in network.named_modules()
    ]


def hooked_modules(policy: Policy) -> list[str]:
    """Names of the modules with forward hooks."""
    return [name for name, module in named_modules(policy) if module._forward_hooks or module._forward_pre_hooks]


def is_dropout(module: nn.Module) -> bool:
    """Whether a module drops something in training mode."""
    return isinstance(module, DROPOUTS) and module.p > 0


def is_same_batch(trial: Trial) -> bool:
    """Whether training replayed the very batch that was sampled."""
    return list(trial.micro_batch.context.seeds) == list(trial.batch.context.seeds)


def mixes_samples(trial: Trial) -> bool:
    """Whether the result of a sample depends on the others of its batch: it is tried among copies of itself."""
    step, context = trial.recorded, trial.batch.context
    rows = [0] * len(context)
    copies = Context(
        prompts=[context.prompts[row] for row in rows],
        seeds=[context.seeds[row] for row in rows],
        inputs={name: [values[row] for row in rows] for name, values in context.inputs.items()},
    )
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

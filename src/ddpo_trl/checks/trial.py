"""A transition whose replay differs, the conditions under which it is replayed, and what the scheduler sees of it."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ddpo_trl.config import DDPOConfig
from ddpo_trl.distributed import is_sharded
from ddpo_trl.policy.fingerprint import Conditions, settings_in_use
from ddpo_trl.policy.policy import Policy
from ddpo_trl.policy.records import SampledBatch, Step
from ddpo_trl.rollout.records import Transition


# How far a log-probability, averaged over dimensions, may move between sampling and training before any update. At the
# batch size of sampling it does not move at all, in half precision neither. Other kernels, which another micro-batch
# size or autograd may choose, move it by about 1e-6 in float32 (more with TensorFloat-32), and by up to 4e-3 in
# bfloat16, where the last steps are the most sensitive; a fault like another guidance by 1e-3 to 10. So a difference
# up to the second number is accepted, but only if it vanishes at the batch size of sampling.
FLOAT32_TOLERANCE = 1e-5
FLOAT32_ROUNDING = 1e-3
HALF_PRECISION_ROUNDING = 0.1
HALF_DTYPES = (torch.bfloat16, torch.float16)

# A condition under which so little of the difference is left is its cause.
VANISHED = 0.1

# So many replays are compared to tell whether they differ from each other. A source of randomness is found if without
# it they agree up to this part of what they differed by: by chance they would not agree so well.
REPLAYS = 4
REPEATED = 0.01

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def log_prob_difference(config: DDPOConfig, replayed: Tensor, recorded: Tensor, latents: Tensor) -> float:
    """Largest difference between `(B,)` log-probabilities, in nats per latent dimension."""
    dimensions = latents[0].numel() if config.log_prob_reduction == "sum" else 1
    return (replayed - recorded).abs().max().item() / dimensions


@dataclass(kw_only=True)
class Trial:
    """
    A transition whose replay has another log-probability than was recorded, to be replayed under other conditions.

    Args:
        policy ([`~ddpo_trl.policy.policy.Policy`]):
            As training calls it.
        micro_batch ([`~ddpo_trl.rollout.records.Transition`]):
            As training replayed it.
        batch ([`~ddpo_trl.policy.records.SampledBatch`]):
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


def autocast_as(trial: Trial) -> torch.autocast:
    """The autocast of sampling."""
    dtype = trial.conditions.autocast
    return torch.autocast(trial.micro_batch.latents.device.type, dtype=dtype, enabled=dtype is not None)


@contextmanager
def settings_of_sampling(trial: Trial) -> Iterator[None]:
    """The settings as they were in sampling."""
    owners = trial.policy.runner.setting_owners
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


# ---- Modules ----


def named_modules(policy: Policy) -> list[tuple[str, nn.Module]]:
    """All modules of all networks of the pipeline, by component and name."""
    return [
        (f"{component}.{name}" if name else component, module)
        for component, network in policy.policy_pipeline.components.items()
        if isinstance(network, nn.Module)
        for name, module in network.named_modules()
    ]


def is_dropout(module: nn.Module) -> bool:
    """Whether a module drops something in training mode."""
    return isinstance(module, DROPOUTS) and module.p > 0

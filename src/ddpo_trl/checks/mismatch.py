"""A transition whose replay differs from sampling, and the changed conditions under which to replay it."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ddpo_trl.config import DDPOConfig
from ddpo_trl.distributed import is_sharded
from ddpo_trl.policy.fingerprint import Fingerprint, settings_in_use
from ddpo_trl.policy.policy import Policy
from ddpo_trl.policy.records import SampledBatch, Step
from ddpo_trl.rollout.records import Transition


# Largest accepted difference of a log-probability, averaged over dimensions, between sampling and training before any
# update. At the batch size of sampling it is 0, in half precision too. Other kernels, which another micro-batch size
# or autograd may select, change it by about 1e-6 in float32 (more with TensorFloat-32), and by up to 4e-3 in bfloat16,
# where the last steps are the most sensitive. A fault such as another guidance scale changes it by 1e-3 to 10. A
# difference up to the rounding limits is accepted only if it vanishes at the batch size of sampling.
FLOAT32_TOLERANCE = 1e-5
FLOAT32_ROUNDING = 1e-3
HALF_PRECISION_ROUNDING = 0.1
HALF_DTYPES = (torch.bfloat16, torch.float16)

# A change is the cause if at most this fraction of the difference is left when it is undone.
VANISHED = 0.1

# Number of replays that are compared with each other. A source of randomness is the cause if without it at most the
# fraction `REPEATED` of their spread is left, which is unlikely to happen by chance.
REPLAYS = 4
REPEATED = 0.01

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def log_prob_difference(config: DDPOConfig, replayed: Tensor, recorded: Tensor, latents: Tensor) -> float:
    """Return the largest difference between `(B,)` log-probabilities, in nats per latent dimension."""
    dimensions = latents[0].numel() if config.log_prob_reduction == "sum" else 1
    return (replayed - recorded).abs().max().item() / dimensions


@dataclass(kw_only=True)
class Mismatch:
    """
    A transition whose replay has another log-probability than the recorded one, to be replayed in other ways.

    Args:
        policy ([`~ddpo_trl.policy.policy.Policy`]):
            The policy as training calls it.
        micro_batch ([`~ddpo_trl.rollout.records.Transition`]):
            The micro-batch as training replayed it.
        batch ([`~ddpo_trl.policy.records.SampledBatch`]):
            The batch in which its worst sample was drawn. It is replayed as a whole, so that size and composition of
            the batch are as in sampling.
        difference (`float`):
            The difference to explain, in nats per latent dimension.

    Attributes:
        spread (`float`):
            Largest difference between replays of it, if replays differ from each other; else 0.
    """

    policy: Policy
    micro_batch: Transition
    batch: SampledBatch
    difference: float
    spread: float = 0.0

    @property
    def recorded(self) -> Step:
        """The recorded step, on the device of the micro-batch."""
        return self.batch.steps[self.micro_batch.step].to(self.micro_batch.latents.device)

    @property
    def fingerprint(self) -> Fingerprint:
        """Fingerprint of the batch, taken in sampling."""
        assert self.batch.fingerprint is not None, "Policy.sample records it"
        return self.batch.fingerprint

    def replay(self, run: Callable[..., Any] | None = None) -> Tensor:
        """Return the log-probabilities of the sampled batch, by `policy` or another way to call it."""
        step = self.recorded
        with torch.no_grad():
            output = (run or self.policy)(self.micro_batch.step, step.latents, step.next_latents, self.batch.context)
        return output.log_probs

    def replay_micro_batch(self) -> Tensor:
        """Return the log-probabilities of the micro-batch, computed with gradients if they are enabled."""
        batch = self.micro_batch
        return self.policy(batch.step, batch.latents, batch.next_latents, batch.context).log_probs.detach()

    def distance(self, left: Tensor, right: Tensor) -> float:
        """Return the largest difference between two results, in the unit of `difference`."""
        return log_prob_difference(self.policy.settings, left, right, self.micro_batch.latents)

    def has_vanished(self, remaining: float) -> bool:
        """Return whether the remaining difference is small enough to count as vanished."""
        return remaining <= VANISHED * self.difference  # and not a NaN

    def vanishes_under(self, condition: AbstractContextManager) -> bool:
        """Return whether the difference vanishes under a condition."""
        with condition:
            if self.spread:
                return self.spread_of(self.replay) <= REPEATED * self.spread
            return self.has_vanished(self.distance(self.replay(), self.recorded.log_probs))

    def spread_of(self, replay: Callable[[], Tensor]) -> float:
        """Return the largest difference of several replays from the first; two alone may agree by chance."""
        first = replay()
        return max(self.distance(replay(), first) for _ in range(REPLAYS - 1))

    def vanishes_when_resampled(self, condition: AbstractContextManager | None = None) -> bool:
        """Return whether the difference vanishes if the batch is sampled and replayed again under a condition."""
        with condition or nullcontext():
            with autocast_as(self):
                context, stochastic = self.batch.context, self.fingerprint.stochastic
                fresh = self.policy.sample(context, record=[self.micro_batch.step], stochastic=stochastic)
            mismatch = Mismatch(
                policy=self.policy, micro_batch=self.micro_batch, batch=fresh, difference=self.difference
            )
            return self.has_vanished(self.distance(mismatch.replay(), mismatch.recorded.log_probs))

    def is_rounding(self) -> bool:
        """Return whether the difference is rounding only: it vanishes at the batch size of sampling."""
        if is_sharded(self.policy):
            return True  # unknown: one process can't replay alone
        return self.distance(self.replay(), self.recorded.log_probs) <= FLOAT32_TOLERANCE


# ---- Changed conditions ----


@contextmanager
def in_evaluation_mode(policy: Policy) -> Iterator[None]:
    """Set all networks of the pipeline to evaluation mode meanwhile."""
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
    """Set the probability of all dropout layers to 0 meanwhile."""
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
    """Remove all forward hooks meanwhile, and set evaluation mode, since a hook may have changed it."""
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


def autocast_as(mismatch: Mismatch) -> torch.autocast:
    """Return the autocast that was used in sampling."""
    dtype = mismatch.fingerprint.autocast
    return torch.autocast(mismatch.micro_batch.latents.device.type, dtype=dtype, enabled=dtype is not None)


@contextmanager
def settings_of_sampling(mismatch: Mismatch) -> Iterator[None]:
    """Restore the settings of sampling meanwhile."""
    owners = mismatch.policy.runner.setting_owners
    now = settings_in_use(owners)
    before = mismatch.fingerprint.settings
    try:
        for owner, values in before.items():
            replace_entries(owners[owner], old=now[owner], new=values)
        yield
    finally:
        for owner, values in before.items():
            replace_entries(owners[owner], old=values, new=now[owner])


def replace_entries(owner: dict[str, Any], old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Replace some entries of a dictionary, in place."""
    for name in old.keys() - new.keys():
        del owner[name]
    owner.update(new)


@contextmanager
def without_option(options: dict[str, Any], name: str) -> Iterator[None]:
    """Remove an option meanwhile, so that the pipeline uses its default."""
    before = dict(options)
    try:
        del options[name]
        yield
    finally:
        options.clear()
        options.update(before)


# ---- Observed steps of the scheduler ----


class Observation(NamedTuple):
    """
    One step of the scheduler, tensors of shape `(B, ...)`.

    Args:
        latents, model_output (`torch.Tensor`):
            Inputs: x_t and the prediction.
        mean (`torch.Tensor`):
            Result: mean of x_{t-1}.
    """

    latents: Tensor
    model_output: Tensor
    mean: Tensor


@contextmanager
def observed_transitions(mismatch: Mismatch) -> Iterator[list[Observation]]:
    """Collect inputs and result of the scheduler at the step of the mismatch."""
    scheduler: Any = mismatch.policy.scheduler
    transition = scheduler.transition
    own = vars(scheduler).copy()
    seen: list[Observation] = []

    def observe(model_output: Tensor, index: int, latents: Tensor, stochastic: bool) -> tuple[Tensor, float]:
        mean, std = transition(model_output, index, latents, stochastic)
        if index == scheduler._skipped + mismatch.micro_batch.step:
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


def sampled_and_replayed_again(mismatch: Mismatch) -> list[Observation]:
    """Return the observations of the step, during sampling and in replay."""
    with observed_transitions(mismatch) as seen:
        mismatch.vanishes_when_resampled()
    return seen


# ---- Modules ----


def named_modules(policy: Policy) -> list[tuple[str, nn.Module]]:
    """Return all modules of all networks of the pipeline, by component and name."""
    return [
        (f"{component}.{name}" if name else component, module)
        for component, network in policy.policy_pipeline.components.items()
        if isinstance(network, nn.Module)
        for name, module in network.named_modules()
    ]


def is_dropout(module: nn.Module) -> bool:
    """Return whether a module is a dropout layer with a probability above 0."""
    return isinstance(module, DROPOUTS) and module.p > 0


def hooked_modules(policy: Policy) -> list[str]:
    """Return the names of the modules with forward hooks."""
    return [name for name, module in named_modules(policy) if module._forward_hooks or module._forward_pre_hooks]

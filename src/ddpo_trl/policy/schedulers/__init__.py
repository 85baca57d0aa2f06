"""Diffusers schedulers whose steps are a Gaussian policy."""

from ddpo_trl.policy.schedulers.actions import (
    ActionSource,
    BeforeSteps,
    DifferentiatedSampling,
    NoGradient,
    Replay,
    Sampling,
    StartingFrom,
    StepReplayed,
)
from ddpo_trl.policy.schedulers.base import PolicyScheduler
from ddpo_trl.policy.schedulers.convert import policy_scheduler
from ddpo_trl.policy.schedulers.layout import learn_layout, numbered


__all__ = [
    "ActionSource",
    "BeforeSteps",
    "DifferentiatedSampling",
    "NoGradient",
    "PolicyScheduler",
    "Replay",
    "Sampling",
    "StartingFrom",
    "StepReplayed",
    "learn_layout",
    "numbered",
    "policy_scheduler",
]

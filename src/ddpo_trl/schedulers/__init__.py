"""Diffusers schedulers whose steps are a Gaussian policy."""

from ddpo_trl.schedulers.actions import (
    ActionSource,
    BeforeSteps,
    DifferentiatedSampling,
    NoGradient,
    Replay,
    Sampling,
    StepReplayed,
)
from ddpo_trl.schedulers.convert import policy_scheduler
from ddpo_trl.schedulers.policy import PolicyScheduler


__all__ = [
    "ActionSource",
    "BeforeSteps",
    "DifferentiatedSampling",
    "NoGradient",
    "PolicyScheduler",
    "Replay",
    "Sampling",
    "StepReplayed",
    "policy_scheduler",
]

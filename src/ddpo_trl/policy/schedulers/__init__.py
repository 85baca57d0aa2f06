"""Diffusers schedulers whose steps are a Gaussian policy."""

from ddpo_trl.policy.schedulers.actions import (
    ActionSource,
    BeforeSteps,
    DifferentiatedSampling,
    NoGradient,
    Numbered,
    Replay,
    Sampling,
    StepReplayed,
)
from ddpo_trl.policy.schedulers.base import PolicyScheduler
from ddpo_trl.policy.schedulers.convert import policy_scheduler
from ddpo_trl.policy.schedulers.layout import learn_layout


__all__ = [
    "ActionSource",
    "BeforeSteps",
    "DifferentiatedSampling",
    "NoGradient",
    "Numbered",
    "PolicyScheduler",
    "Replay",
    "Sampling",
    "StepReplayed",
    "learn_layout",
    "policy_scheduler",
]

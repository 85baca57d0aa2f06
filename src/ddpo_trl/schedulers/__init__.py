"""Diffusers schedulers whose steps are a Gaussian policy."""

from ddpo_trl.schedulers.actions import (
    ActionSource,
    BeforeSteps,
    DifferentiatedSampling,
    NoGradient,
    Numbered,
    Replay,
    Sampling,
    StepReplayed,
)
from ddpo_trl.schedulers.convert import policy_scheduler
from ddpo_trl.schedulers.layout import learn_layout
from ddpo_trl.schedulers.policy import PolicyScheduler


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

"""Diffusers schedulers whose steps are a Gaussian policy."""

from ddpo_trl.policy.schedulers.actions import ActionSource, Replay, Sampling, StepReplayed
from ddpo_trl.policy.schedulers.base import PolicyScheduler
from ddpo_trl.policy.schedulers.convert import policy_scheduler


__all__ = ["ActionSource", "PolicyScheduler", "Replay", "Sampling", "StepReplayed", "policy_scheduler"]

"""
The on-policy guard: before any update a replayed step has the log-probability it was sampled with, or its cause is
named.

The cause is found by trial: suspects replay the transition, each under one changed condition.
"""

from ddpo_trl.checks.replay import ReplayCheck, replay_problem
from ddpo_trl.checks.trial import log_prob_difference


__all__ = ["ReplayCheck", "log_prob_difference", "replay_problem"]

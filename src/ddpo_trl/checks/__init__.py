"""
The on-policy check: before any update, a recomputed log-probability must equal the sampled one. If it does not, the
error names the cause.

Possible causes are tried one by one: each replays the transition with one condition changed.
"""

from ddpo_trl.checks.mismatch import log_prob_difference
from ddpo_trl.checks.replay import ReplayCheck, replay_problem


__all__ = ["ReplayCheck", "log_prob_difference", "replay_problem"]

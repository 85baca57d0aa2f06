"""The on-policy check: before any update, a recomputed log-probability must equal the sampled one."""

from ddpo_trl.checks.mismatch import log_prob_difference
from ddpo_trl.checks.replay import ReplayCheck, replay_problem


__all__ = ["ReplayCheck", "log_prob_difference", "replay_problem"]

"""What a collector measures of its work."""

from __future__ import annotations

from dataclasses import dataclass

RESTORED = ("restored_groups", "restored_tokens", "dropped_tokens")
"""Counters of the rollout bank."""


@dataclass
class Timings:
    """Seconds spent in each phase since the last reading, on this rank (rewards are computed on global rank 0)."""

    rollout: float = 0.0
    weight_sync: float = 0.0
    reward: float = 0.0


@dataclass
class Counts:
    """Failure and staleness counters since the start of the run (global rank 0)."""

    aborted_rollouts: int = 0
    redrawn_groups: int = 0
    dropped_groups: int = 0
    stale_groups: int = 0
    cut_groups: int = 0  # over-sampled groups that were not needed: discarded
    judged_groups: int = 0  # whose rewards dynamic sampling looked at
    rejected_groups: int = 0  # of these those that were discarded
    short_groups: int = 0  # that steps lacked since the limit of problems drawn in their place was reached
    carried_groups: int = 0  # over-sampled groups carried over to the next step (partial rollouts)
    restored_groups: int = 0  # with responses that the rollout bank has from an earlier start of the run
    restored_tokens: int = 0  # of these responses
    dropped_tokens: int = 0  # that the bank had and that may not be used

"""The seam between the trainer and whatever judges a response."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from asd_megatron.errors import UserError
from asd_megatron.records import Problem

Item = tuple[Problem, str]


class RewardError(UserError):
    """Rewards cannot be had: a user's function raised or returned no number, workers keep dying, no such verifier."""


class Verifier(Protocol):
    """Scores responses. Lives on global rank 0 alone; calls come from one thread at a time."""

    feedback_kind: str
    """What the teacher hears of the student's response: `binary` (correct or not) or `fraction` (tests passed)."""

    @property
    def counters(self) -> Mapping[str, int]:
        """What went wrong since the start: `timeouts` and `errors` (answers that scored 0 unjudged), `restarts`."""
        ...

    def score(self, items: Sequence[Item]) -> list[float]:
        """One finite reward an item (problem, decoded response), in order. Raises RewardError."""
        ...

    def close(self) -> None:
        """Stop what the verifier started. Safe to call twice."""
        ...


def new_counters() -> dict[str, int]:
    return {"timeouts": 0, "errors": 0, "restarts": 0}


def tests_of(problem: Problem) -> int | None:
    """How many test cases the problem's `tests` field holds (a number or a list); None if it has none."""
    tests = problem.extra.get("tests")
    if isinstance(tests, int) and not isinstance(tests, bool):
        return tests
    return len(tests) if isinstance(tests, list | tuple) else None

"""The interface of verifiers, which score responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from asd_megatron.errors import UserError
from asd_megatron.records import Problem

Item = tuple[Problem, str]


class RewardError(UserError):
    """Rewards cannot be computed: a user's function raised, hung or returned no number, workers keep dying, or there is
    no such verifier."""


class Verifier(Protocol):
    """Scores responses. Lives on global rank 0 alone; calls come from one thread at a time."""

    feedback_kind: str
    """What the teacher's prompt says of the response: `binary` (correct or not) or `fraction` (tests passed)."""

    @property
    def counters(self) -> Mapping[str, int]:
        """Failures since the start: `timeouts` and `errors` (answers that scored 0 unjudged), `restarts` of workers."""
        ...

    def score(self, items: Sequence[Item]) -> list[float]:
        """One finite reward for each item (problem, decoded response), in order. Raises RewardError."""
        ...

    def close(self) -> None:
        """Stop what the verifier started. Safe to call twice."""
        ...


def new_counters() -> dict[str, int]:
    """The counters of a verifier, all 0."""
    return {"timeouts": 0, "errors": 0, "restarts": 0}


def tests_of(problem: Problem) -> int | None:
    """How many test cases the problem's `tests` field holds (a number or a list); None if it has none."""
    tests = problem.extra.get("tests")
    if isinstance(tests, int) and not isinstance(tests, bool):
        return tests
    return len(tests) if isinstance(tests, list | tuple) else None

"""The interface of verifiers, which score responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from asd_megatron.errors import UserError
from asd_megatron.records import Problem


class Response(NamedTuple):
    """A response to be scored. A plain pair (problem, text) is a complete one."""

    problem: Problem
    text: str
    """Decoded, without the prompt."""
    truncated: bool = False
    """Cut off by the token budget (`FinishReason.LENGTH`)."""


class RewardError(UserError):
    """Rewards cannot be computed: a user's function raised, hung or returned no number, workers keep dying, or there is
    no such verifier."""


class Verifier(Protocol):
    """Scores responses. Lives on global rank 0 alone; calls come from one thread at a time."""

    feedback_kind: str
    """What the teacher's prompt says of the response: `binary` (correct or not) or `fraction` (tests passed)."""

    @property
    def counters(self) -> Mapping[str, int]:
        """Failures since the start: `timeouts` and `errors` (answers that scored 0 unjudged), `restarts` of workers;
        `truncated` (responses that scored 0 for being cut off) where that rule applies; of `code`, `no_code` (responses
        without a program), and in `timeouts` tests."""
        ...

    def score(self, responses: Sequence[Response]) -> list[float]:
        """One finite reward for each response, in order. Raises RewardError.

        A verifier judges a truncated response like any other; `composed.ComposedReward` decides whether it is asked.
        """
        ...

    def close(self) -> None:
        """Stop what the verifier started. Safe to call twice."""
        ...


def check_answers(name: str, responses: Sequence[Response]) -> None:
    """Raise RewardError for a problem without an answer, which the verifier `name` compares with."""
    without = next((problem for problem, *_ in responses if not problem.answer.strip()), None)
    if without is not None:
        raise RewardError(
            f"reward.name {name} compares with the problem's `answer`, and problem {without.prompt_id} has none"
            f"{', but tests: set reward.name code (docs/sandbox.md)' if tests_of(without) else ': give its line one'}"
        )


def new_counters() -> dict[str, int]:
    """The counters of a verifier, all 0."""
    return {"timeouts": 0, "errors": 0, "restarts": 0}


def tests_of(problem: Problem, max_tests: int | None = None) -> int | None:
    """How many test cases the problem's `tests` field holds (a number or a list), `max_tests` at most; None if it has
    none."""
    tests = problem.extra.get("tests")
    count = len(tests) if isinstance(tests, list | tuple) else tests
    if not isinstance(count, int) or isinstance(count, bool):
        return None
    return count if max_tests is None else min(count, max_tests)

"""The tests of a problem (field `tests` of its line) as what a sandbox runs and what it has to give.

Each test is an object of one of three forms (docs/sandbox.md):

    {"input": TEXT, "output": TEXT}
    {"assert": PYTHON STATEMENTS}
    {"function": NAME, "arguments": [...], "expected": JSON VALUE}
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from asd_megatron.records import Problem
from asd_megatron.reward.base import RewardError
from asd_megatron.reward.code_asserts import Asserts, rewritten
from asd_megatron.reward.code_values import Unreadable, parsed, same_output, same_value
from asd_megatron.sandbox.pool import CallTest, StatementsTest, Status, StdinTest, Test, TestResult

FORMS = '{"input", "output"}, {"assert"} or {"function", "arguments", "expected"}'
FUNCTION = re.compile(r"[A-Za-z_]\w*(?:\(\))?(?:\.[A-Za-z_]\w*(?:\(\))?)*")


class Case(Protocol):
    """One test: what is run, and whether a result passes."""

    @property
    def test(self) -> Test: ...

    def passed(self, result: TestResult) -> bool: ...


@dataclass(frozen=True)
class StdinCase:
    """The program as a script: its output for an input (`code_values.same_output`)."""

    test: StdinTest
    output: str

    def passed(self, result: TestResult) -> bool:
        if result.status is not Status.FINISHED:
            return False
        return same_output(result.stdout.decode(errors="replace"), self.output)


@dataclass(frozen=True)
class CallCase:
    """A function's result for arguments (`code_values.same_value`, as JSON)."""

    test: CallTest
    expected: Any

    def passed(self, result: TestResult) -> bool:
        if result.status is not Status.FINISHED or len(result.verdict) != 1:
            return False
        try:
            _, value = parsed(result.verdict[0])
        except Unreadable:
            return False
        return same_value(value, self.expected, as_json=True)


@dataclass(frozen=True)
class AssertCase:
    """Statements after the program (`code_asserts`)."""

    test: StatementsTest
    asserts: Asserts

    def passed(self, result: TestResult) -> bool:
        if result.status is not Status.FINISHED:
            return False
        seen = set()
        for line in result.verdict:
            try:
                index, value = parsed(line)
            except Unreadable:
                return False
            if index not in self.asserts.expected:
                return False
            if not same_value(value, self.asserts.expected[index], as_json=False):
                return False
            seen.add(index)
        return seen >= self.asserts.required


def cases_of(problem: Problem, max_tests: int | None = None) -> list[Case]:
    """The problem's tests, at most `max_tests` of them, evenly chosen over their order. Raises RewardError."""
    tests = tests_field(problem)
    return [_case(problem, index, tests[index]) for index in chosen(len(tests), max_tests)]


def tests_field(problem: Problem) -> Sequence[Any]:
    """The problem's tests as its line has them. Raises RewardError where there are none."""
    tests = problem.extra.get("tests")
    if not isinstance(tests, Sequence) or isinstance(tests, str) or not tests:
        raise RewardError(
            f"reward.name code needs tests, and problem {problem.prompt_id} has none: give its line a field `tests`, a"
            f" list of {FORMS} (docs/sandbox.md)"
        )
    return tests


def chosen(count: int, max_tests: int | None) -> list[int]:
    """The indices of the tests that are run: all, or every count / max_tests-th from the first."""
    if max_tests is None or count <= max_tests:
        return list(range(count))
    return [i * count // max_tests for i in range(max_tests)]


def setup_of(problem: Problem) -> str:
    """The Python text that is executed before the program. Raises RewardError."""
    setup = problem.extra.get("setup") or ""
    if not isinstance(setup, str):
        raise RewardError(f"problem {problem.prompt_id}: its field `setup` is no text")
    return setup


def _case(problem: Problem, index: int, test: object) -> Case:
    def refuse(what: str) -> RewardError:
        return RewardError(f"problem {problem.prompt_id}, test {index + 1}: {what}. A test is one of {FORMS}")

    if not isinstance(test, Mapping):
        raise refuse("it is no object")
    keys = set(test)
    if keys == {"input", "output"}:
        if not (isinstance(test["input"], str) and isinstance(test["output"], str)):
            raise refuse("`input` and `output` have to be texts")
        return StdinCase(StdinTest(test["input"]), test["output"])
    if keys == {"assert"}:
        try:
            asserts = rewritten(test["assert"])
        except (SyntaxError, ValueError, TypeError, RecursionError) as e:
            raise refuse(f"`assert` is no Python text ({e})") from e
        return AssertCase(StatementsTest(asserts.text), asserts)
    if keys == {"function", "arguments", "expected"}:
        function, arguments = test["function"], test["arguments"]
        if not (isinstance(function, str) and FUNCTION.fullmatch(function)):
            raise refuse(f"`function` {function!r} is no name, Class.name or Class().name")
        if not isinstance(arguments, list | tuple):
            raise refuse("`arguments` has to be a list")
        return CallCase(CallTest(function, tuple(map(_plain, arguments))), _plain(test["expected"]))
    raise refuse(f"it has the fields {', '.join(sorted(map(str, keys))) or 'of an empty object'}")


def _plain(value: Any) -> Any:
    """A value of a problem's line as JSON has it: lines are kept as read-only mappings and tuples."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value

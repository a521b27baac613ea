"""`reward.name: code`: programs in responses, their tests, and the reward. Needs bubblewrap."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from asd_megatron.antisd.privileged import feedback
from asd_megatron.data.jsonl import freeze
from asd_megatron.data.problems import load_problems
from asd_megatron.errors import UserError
from asd_megatron.records import Problem
from asd_megatron.reward import base
from asd_megatron.reward.base import Response, RewardError
from asd_megatron.reward.code import CodeVerifier
from asd_megatron.reward.code_asserts import rewritten
from asd_megatron.reward.code_cases import cases_of, chosen
from asd_megatron.reward.code_program import program_of
from asd_megatron.reward.code_values import same_output, same_value
from asd_megatron.reward.factory import make_verifier
from asd_megatron.sandbox.supervisor import tagged
from tests.reward.code_problems import PROBLEMS, CodeProblem

EXAMPLE = Path(__file__).parents[2] / "examples" / "code" / "problems.jsonl"
LIMITS: dict[str, Any] = {"timeout_seconds": 0.5, "wall_timeout_seconds": 60.0, "memory_mb": 192}


@pytest.fixture(scope="module")
def verifier() -> Iterator[CodeVerifier]:
    made = CodeVerifier(**LIMITS, max_exhausted=None)
    yield made
    made.close()


def problem_of(tests: Any, name: str = "p", **extra: Any) -> Problem:
    return Problem(name, "", prompt="question", extra=freeze({"tests": tests, **extra}))


def response(problem: Problem, program: str) -> Response:
    return Response(problem, f"Some thoughts.\n\n```python\n{program}\n```\nDone.")


# ------------------------------------------------------------------ scores


def test_problems_with_right_and_wrong_programs(verifier: CodeVerifier) -> None:
    responses, expected = [], []
    for p in PROBLEMS:
        problem = problem_of(list(p.tests), p.name, setup=p.setup)
        for program, passed in p.programs:
            responses.append(response(problem, program))
            expected.append((p.name, program, passed))
    rewards = verifier.score(responses)
    found = [
        (name, program, reward * len(r.problem.extra["tests"]))
        for (name, program, _), reward, r in zip(expected, rewards, responses, strict=True)
    ]
    assert found == expected
    assert verifier.counters["errors"] == verifier.counters["no_code"] == 0 < verifier.counters["timeouts"]


def by_name(name: str) -> CodeProblem:
    return next(p for p in PROBLEMS if p.name == name)


def test_the_teacher_reads_how_many_tests_were_passed() -> None:
    parity = by_name("parity")
    problem = problem_of(list(parity.tests))
    for cap, lines in (
        (None, ["Your code passes 7 of 7 test cases.", "Your code passes 4 of 7 test cases."]),
        (4, ["Your code passes 4 of 4 test cases.", "Your code passes 1 of 4 test cases."]),  # of 0, 1, 3 and 5
    ):
        code = CodeVerifier(**LIMITS, max_tests=cap)
        rewards = code.score([response(problem, program) for program, _ in parity.programs[:2]])
        assert [feedback(r, code.feedback_kind, tests=base.tests_of(problem, cap)) for r in rewards] == lines
    whole = make_verifier("code", code={"all_or_nothing": True}, timeout_seconds=0.5)
    assert whole.feedback_kind == "binary"
    assert whole.score([response(problem, program) for program, _ in parity.programs]) == [1.0, 0.0, 0.0, 0.0]


def test_programs_that_exceed_limits_again_and_again_are_given_up() -> None:
    problem = problem_of([{"input": str(i), "output": "0"} for i in range(40)])
    code = CodeVerifier(**LIMITS, max_exhausted=2)
    slow = "if int(input()) > 2:\n    while True: pass\nprint(0)"
    assert code.score([response(problem, slow)]) == [3 / 40] and code.counters["timeouts"] == 2


def test_responses_without_a_program_and_cut_off_ones(caplog: pytest.LogCaptureFixture) -> None:
    problem = problem_of([{"input": "", "output": "1"}])
    code = make_verifier("code", timeout_seconds=2.0, workers=1)
    texts = ["print(1)", "<think>\n```python\nprint(1)\n```\n", "```python\nprint(1)"]
    assert code.score([Response(problem, text) for text in texts]) == [0.0] * 3
    assert code.counters["no_code"] == 3
    good = response(problem, "print(1)")
    assert code.score([good, good._replace(truncated=True)]) == [1.0, 0.0] and code.counters["truncated"] == 1
    code.close()


def test_the_results_do_not_enter_the_program(verifier: CodeVerifier) -> None:
    """A program that searches all objects of its process for the expected values finds none of them."""
    tests = [
        {"function": "f", "arguments": [1], "expected": "secret-1"},
        {"assert": "def check(c):\n    assert c(2) == 'secret-2'\ncheck(f)"},
        {"assert": "assert f(3) == 'secret-3'"},
    ]
    program = """
import gc, sys
def f(n):
    frame, texts = sys._getframe(), []
    while frame:
        texts.append(repr(frame.f_locals) + repr(frame.f_code.co_consts))
        frame = frame.f_back
    texts += [repr(o) for o in gc.get_objects() if isinstance(o, (dict, list, tuple))]
    return next((f"secret-{n}" for text in texts if f"secret-{n}" in text.replace("secret-{n}", "")), "none")
"""
    assert verifier.score([response(problem_of(tests), program)]) == [0.0]


def test_a_machine_without_protections(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(RewardError, match="lacks protections: .*no bwrap.*apt-get install bubblewrap.*allow_unsafe"):
        make_verifier("code")
    with caplog.at_level(logging.WARNING):
        unsafe = make_verifier("code", allow_unsafe_sandbox=True, timeout_seconds=5.0, code={"processes": 4})
    assert "run without these protections: namespaces" in caplog.text
    assert unsafe.score([response(problem_of([{"input": "1", "output": "1"}]), "print(input())")]) == [1.0]
    unsafe.close()


# ------------------------------------------------------------------ programs in responses


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("a\n```python\nx = 1\n```\nb\n```py\nx = 2\n```", "x = 2\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("~~~python\nx = '```'\n~~~", "x = '```'\n"),
        ("````python\ns = '''\n```\n'''\n````", "s = '''\n```\n'''\n"),
        ("```Python3 title=a.py\nx = 1\n```", "x = 1\n"),
        ("1. so:\n   ```python\n   if x:\n       y()\n   ```", "if x:\n    y()\n"),
        ("```python\nx = 1\n```\nIt prints\n```\n5\n```\nRun\n```bash\npython a.py\n```", "x = 1\n"),
        ("```python\nx = 1\n```\n```bash\npython a.py", "x = 1\n"),
        ("```python\nx = 1\n```\nBetter:\n```python\nx = 2\n", None),
        ("```python\nx = 1\n```\n```\nx = 2\n", None),
        ("<think>```python\nx = 1\n```</think>\n```python\nx = 2\n```", "x = 2\n"),
        ("<think>\n```python\nx = 1\n```\n</think>none", None),
        ("x = 1", None),
        ("use ```python x = 1``` there", None),
        ("```python\n```", "\n"),
        ("- So: ```python\n  x = 1\n  ```", "x = 1\n"),
        ("In ```python\n```python:main.py\nx = 1\n```", "x = 1\n"),
        ("```python3.11\ndef f():\n    '''\n    ```\n    '''\n```", "def f():\n    '''\n    ```\n    '''\n"),
        ("```python-repl\n>>> 1\n```", None),
        ("```python\r\nx = '\u2028'\r\n```\r\n", "x = '\u2028'\n"),
        ("", None),
    ],
)
def test_program_of(text: str, program: str | None) -> None:
    assert program_of(text) == program


# ------------------------------------------------------------------ comparing


@pytest.mark.parametrize(
    ("output", "expected", "same"),
    [
        ("1 2\n3\n\n", "1 2  \n3", True),
        ("1  2", "1 2", True),
        ("a  b", "a b", False),
        ("1\n\n2", "1\n2", False),
        ("0.3333333", "0.33333333333", True),
        ("1000000.4", "1000000.0", True),
        ("0.33", "0.3333333", False),
        ("10000001", "10000000", False),
        ("1.0", "1", True),
        ("01", "1", False),
        ("11", "0011", False),
        ("1000000006.0", "1000000007", False),
        ("9007199254740992.0", "9007199254740993", False),
        ("nan", "1.0", False),
        ("Case 1: 2.50", "Case 1: 2.5", True),
        ("case 1: 2.5", "Case 1: 2.5", False),
        ("1e400", "1e401", False),
        ("", "", True),
        ("9" * 5000, "9" * 5000, True),
        ("9" * 5000, "8" * 5000, False),
    ],
)
def test_same_output(output: str, expected: str, same: bool) -> None:
    assert same_output(output, expected) == same


def test_same_value() -> None:
    values: list[Any] = [None, True, False, 0, 1, -1, 2**80, 0.5, 1.0, "", "1", b"1", [], (), [1], (1,), {}, {1: "a"}]
    values += [{"1": "a"}, {1}, set(), {(1, 2)}, {"a": [1, (2, None)]}, 1j, [[1]], float("inf"), {None: 1}]
    for value in values:
        for expected in values:
            sent = json.loads(json.dumps(tagged(value)))
            assert same_value(sent, expected, as_json=False) == (value == expected), (value, expected)
    for value, expected, same in (
        ((1, (2, 3)), [1, [2, 3]], True),
        ({1: 2.0000001}, {"1": 2}, True),
        ({None: 1, True: 2}, {"null": 1, "true": 2}, True),
        (10**20, 10**20 + 1, False),
        (1000000006.0, 1000000007, False),
        (1e20, 10**20, True),
        ("1", 1, False),
        ({1, 2}, [1, 2], False),
    ):
        assert same_value(json.loads(json.dumps(tagged(value))), expected, as_json=True) == same


@pytest.mark.parametrize("as_json", [True, False])
def test_forged_values_are_wrong_and_cheap(as_json: bool) -> None:
    collisions = ["set", *(["int", hex(i * (2**61 - 1))] for i in range(20_000))]
    deep: Any = "x"
    for _ in range(900):
        deep = ["list", deep]
    for forged in (collisions, deep, [], ["int"], ["int", "x"], ["dict", 1], [["int", "0x1"]], ["float", None], {}):
        for expected in (1, [1], {1, 2}, {"a": 1}, "x", b"x", 1.5):
            assert not same_value(forged, expected, as_json=as_json)


def test_asserts_lose_their_literals() -> None:
    asserts = rewritten(
        "x = 1\nassert f(x) == 2, 'no'\ndef check(c):\n    assert [3] == c(1)\n    assert c(1)\ncheck(f)"
    )
    assert "2" not in asserts.text and "3" not in asserts.text and "assert c(1)" in asserts.text
    assert (asserts.expected, asserts.required) == ({0: 2, 1: [3]}, {0, 1})
    unused = rewritten("def check(c):\n    assert c(1) == 3")
    assert unused.required == frozenset()  # nobody calls it
    plain = "assert f(1) < 2\nassert f(1) == g(1)\nfor i in range(2):\n    assert f(i) == 1"
    assert rewritten(plain).text == plain


def test_which_tests_are_run() -> None:
    assert chosen(3, None) == chosen(3, 5) == [0, 1, 2]
    assert chosen(10, 4) == [0, 2, 5, 7] and chosen(7, 3) == [0, 2, 4]


@pytest.mark.parametrize(
    ("tests", "words"),
    [
        (None, "problem p has none: give its line a field `tests`"),
        ([], "problem p has none"),
        ("x", "problem p has none"),
        ([{"input": "1", "output": "2"}, {"input": 1, "output": "2"}], "test 2: `input` and `output` have to be texts"),
        ([{"input": "1"}], "test 1: it has the fields input"),
        ([5], "it is no object"),
        ([{"assert": "assert ("}], "`assert` is no Python text"),
        ([{"function": "f(1)", "arguments": [], "expected": 1}], "`function` 'f\\(1\\)' is no name"),
        ([{"function": "f", "arguments": {}, "expected": 1}], "`arguments` has to be a list"),
    ],
)
def test_tests_that_cannot_be_run(tests: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        cases_of(problem_of(tests))


def test_the_example_is_solved_by_its_solutions(verifier: CodeVerifier) -> None:
    problems = load_problems(EXAMPLE).take(None)
    assert len(problems) == 8
    assert verifier.score([Response(p, p.solution or "") for p in problems]) == [1.0] * 8

"""Rewards of reasoning-gym's own verifiers: which text they judge, in workers that a response cannot misuse."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from asd_megatron.data.jsonl import freeze
from asd_megatron.errors import UserError
from asd_megatron.gym.stream import Task, item_of
from asd_megatron.records import Problem
from asd_megatron.reward.reasoning_gym import ReasoningGymVerifier, given_answer
from asd_megatron.reward.reasoning_gym_worker import is_arithmetic


@pytest.fixture(scope="module")
def verifier() -> Iterator[ReasoningGymVerifier]:
    v = ReasoningGymVerifier(timeout_seconds=20, workers=1)
    yield v
    v.close()


def problem(task: str, **parameters: Any) -> Problem:
    return Task(task, parameters).draw(1 << 21, 1).problems[0]


def marked(text: str) -> str:
    return f"<answer>{text}</answer>"


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("so <answer> 17\n</answer>.", "17"),
        ("<answer>1</answer> no, <answer>2</answer>", "2"),
        ("<answer>1 2\n3 4</answer>", "1 2\n3 4"),
        ("<answer>1</answer> and <answer>2", None),
        (r"<answer>\boxed{1}</answer>", "1"),
        ("<think><answer>1</answer></think> <answer>2</answer>", "2"),
        ("<think><answer>1</answer>", None),
        (r"<answer>1</answer> \boxed{2} #### 3", "1"),
        (r"\boxed{1} or \boxed{2} #### 3", "2"),
        ("</answer> #### 3\nrest", "3"),
        ("the answer is 3", None),
        ("<answer>3", None),
        ("", None),
        ("<answer>" * 50_000, None),
        ("</answer>" * 50_000, None),
    ],
)
def test_the_marked_answer(response: str, answer: str | None) -> None:
    assert given_answer(response) == answer


def test_scores(verifier: ReasoningGymVerifier) -> None:
    sums, numbers = problem("chain_sum"), problem("countdown")
    items = [
        (sums, marked(sums.answer), 1.0),
        (sums, f"#### {sums.answer}", 1.0),
        (sums, sums.answer, 0.0),  # not marked
        (sums, marked(f"{sums.answer} !"), len(sums.answer) / (len(sums.answer) + 2)),
        (sums, marked("-1"), 0.0),
        (numbers, marked(numbers.answer), 1.0),
        (numbers, marked(f"({numbers.answer}) + 0*1"), 0.05),  # other numbers than those given
        (numbers, marked("none"), 0.01),
        (problem("graph_color"), marked("{}"), 0.01),  # its items have no answer of their own
    ]
    scores = verifier.score([(p, text) for p, text, _ in items])
    assert scores == pytest.approx([score for _, _, score in items])
    assert verifier.counters == {"timeouts": 0, "errors": 0, "restarts": 0} and verifier.score([]) == []


ATTACKS = {
    "spiral_matrix": ("entry['answer'].split()", "[n for n in entry['metadata']['solution']]"),
    "string_insertion": ("list(entry['answer'])",),
    "n_queens": ("entry['metadata']['solutions'][0]",),
    "binary_matrix": ("entry['metadata']['solution']",),
    "countdown": ("{touch}", "sympify(chr(49))", "(input)()", "(1).__class__"),
    "simple_integration": ("{touch}", "print(x)"),
}


def test_an_answer_is_no_program(verifier: ReasoningGymVerifier, tmp_path: Path) -> None:
    """Each of these would have reached the expected answer, or the machine, through `eval`."""
    touched = tmp_path / "touched"
    touch = f"__import__('os').system('touch {touched}')"
    for task, texts in ATTACKS.items():
        p = problem(task)
        scores = verifier.score([(p, marked(text.format(touch=touch))) for text in texts])
        assert max(scores) <= 0.05, task
    assert not touched.exists()
    integral = problem("simple_integration")
    asked = item_of(integral)["metadata"]
    unworked = f"Integral({asked['integrand']}, {asked['variable']})"  # right by definition
    assert verifier.score([(integral, marked(t)) for t in (unworked, integral.answer)]) == [0.0, 1.0]
    honest = problem("spiral_matrix")
    assert verifier.score([(honest, marked(str([int(n) for n in honest.answer.split()])))]) == [0.1]


@pytest.mark.parametrize("text", ["2*(3 + 4)", "x**2/2 + C", "-log(cos(x))", "3!", "2.5e-3*x", "asinh (x) + Abs(y)"])
def test_arithmetic(text: str) -> None:
    assert is_arithmetic(text)


@pytest.mark.parametrize(
    "text", ["exec(1)", "x.diff()", "x. diff", "(exec)(1)", "a_b", "'a'", "[1]", "{1}", "lambda: 1", "x:=1", "f(x)"]
)
def test_no_arithmetic(text: str) -> None:
    assert not is_arithmetic(text)


def test_failures_are_counted(verifier: ReasoningGymVerifier, caplog: pytest.LogCaptureFixture) -> None:
    before = dict(verifier.counters)
    assert verifier.score([(problem("boxnet"), marked("0"))] * 3) == [0.0] * 3
    assert verifier.counters["errors"] == before["errors"] + 1, "equal answers are judged once"
    assert "TypeError" in caplog.text


def test_items_that_are_not_those_of_the_problem(verifier: ReasoningGymVerifier) -> None:
    p = problem("chain_sum")
    other = dataclasses.replace(p, extra=freeze({**p.extra, "digest": "0"}))
    with pytest.raises(UserError, match="is generated differently in a reward worker"):
        verifier.score([(other, marked("1"))])
    with pytest.raises(UserError, match="problem q, which is not of its sets"):
        verifier.score([(Problem("q", "1", prompt="?"), marked("1"))])


# the last one: its worker is replaced, and nobody has to wait for the new one
def test_a_slow_answer_is_bounded(verifier: ReasoningGymVerifier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifier._pool, "limits", dataclasses.replace(verifier._pool.limits, wall_seconds=1.0))
    before, pid = verifier.counters["timeouts"], verifier._pool._workers[0].process.pid
    assert verifier.score([(problem("countdown"), marked("9**9**9**9"))]) == [0.0]
    assert verifier.counters["timeouts"] == before + 1
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)

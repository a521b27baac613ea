from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from asd_megatron.errors import UserError
from asd_megatron.records import Problem
from asd_megatron.reward.base import tests_of as count_tests
from asd_megatron.reward.custom import CustomVerifier
from asd_megatron.reward.exact import ExactVerifier
from asd_megatron.reward.factory import make_verifier

PROBLEM = Problem("p7", "a  b", prompt="?", extra={"tests": (1, 2, 3)})

REWARDS = """
from dataclasses import dataclass
import torch

@dataclass
class Helper:
    value: float

def length(problem, response): return Helper(len(response) / 10).value
def same(problem, response): return response == problem.answer
def broken(problem, response): return 1 / (len(response) - 3)
def nothing(problem, response): pass
def text(problem, response): return "1.0"
def tensor(problem, response): return torch.tensor(1.0)
def infinite(problem, response): return float("inf")
def fraction(problem, response): return 2 / 3
fraction.feedback_kind = "fraction"
def odd(problem, response): return 0.0
odd.feedback_kind = "stars"
constant = 3
"""


@pytest.fixture
def rewards(tmp_path: Path) -> Path:
    path = tmp_path / "math.py"  # shadows nothing
    path.write_text(REWARDS)
    return path


def test_exact() -> None:
    v = ExactVerifier()
    assert v.score([(PROBLEM, " a\nb "), (PROBLEM, "ab"), (PROBLEM, "A b"), (PROBLEM, "")]) == [1.0, 0.0, 0.0, 0.0]
    v.close()


def test_custom_from_a_file(rewards: Path) -> None:
    v = make_verifier(f"{rewards}:length")
    assert v.score([(PROBLEM, "12345"), (PROBLEM, "")]) == [0.5, 0.0] and v.feedback_kind == "binary"
    assert make_verifier(f"{rewards}:same").score([(PROBLEM, "a  b"), (PROBLEM, "x")]) == [1.0, 0.0]
    fraction = make_verifier(f"{rewards}:fraction")
    assert fraction.feedback_kind == "fraction" and fraction.score([(PROBLEM, "x")]) == [2 / 3]
    with pytest.raises(UserError, match="problem q has no field `tests`"):
        fraction.score([(Problem("q", "1", prompt="?"), "x")])


def test_custom_from_a_module_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards_module.py").write_text("def reward(problem, response): return 0.25\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    assert make_verifier("my_rewards_module:reward").score([(PROBLEM, "x")]) == [0.25]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("broken", "raised ZeroDivisionError: division by zero"),
        ("nothing", "returned NoneType, not a number"),
        ("text", "returned str, not a number"),
        ("tensor", "returned Tensor, not a number"),
        ("infinite", "returned inf, which is not finite"),
    ],
)
def test_a_reward_that_fails(rewards: Path, name: str, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    items = [(PROBLEM, "abc")]
    with pytest.raises(UserError) as e:
        CustomVerifier(f"{rewards}:{name}").score(items)
    message = str(e.value)
    assert f"{rewards}:{name} {reason} (problem p7, response 'abc')" in message and "reward.on_error" in message
    zero = make_verifier(f"{rewards}:{name}", on_error="zero")
    assert zero.score(items * 2) == [0.0, 0.0] and zero.counters["errors"] == 2
    assert reason in caplog.text


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nowhere.py:f", "there is no file nowhere.py"),
        ("no.such.module:f", "importing no.such.module failed: ModuleNotFoundError"),
        ("{rewards}:missing", "has no 'missing'; it has Helper, broken, dataclass, fraction, infinite, length"),
        ("{rewards}:constant", "'constant' is a int, not a function"),
        ("{rewards}:odd", "feedback_kind 'stars' does not exist"),
        ("{rewards}:", "write package.module:function"),
        (
            "maths",
            "'maths' does not exist; did you mean 'math'? Choose exact, math, puzzle, reasoning_gym, or your own",
        ),
    ],
)
def test_unusable_names(rewards: Path, name: str, reason: str) -> None:
    with pytest.raises(UserError) as e:
        make_verifier(name.replace("{rewards}", str(rewards)))
    assert reason in str(e.value)


def test_a_file_that_cannot_be_imported(tmp_path: Path) -> None:
    (tmp_path / "r.py").write_text("raise RuntimeError('not today')")
    with pytest.raises(UserError, match="failed: RuntimeError: not today"):
        make_verifier(f"{tmp_path}/r.py:f")
    with pytest.raises(UserError, match="reward.on_error 'ignore' does not exist"):
        make_verifier(f"{tmp_path}/r.py:f", on_error="ignore")


@pytest.mark.parametrize(("tests", "number"), [((1, 2), 2), (5, 5), ([], 0), (True, None), ("x", None), (None, None)])
def test_number_of_tests(tests: Any, number: int | None) -> None:
    assert count_tests(Problem("p", "1", prompt="?", extra={"tests": tests})) == number


def test_puzzle_and_math_by_name() -> None:
    from asd_megatron.puzzle.task import PuzzleStream

    problem = PuzzleStream("test", 1, 0).take(1)[0]
    v = make_verifier("puzzle")
    assert v.score([(problem, f"So {problem.answer}"), (problem, "So")]) == [1.0, 0.0]
    v.close()
    m = make_verifier("math", timeout_seconds=20.0, workers=1)
    assert m.score([(Problem("p", "1/2", prompt="?"), "#### 0.5")]) == [1.0]
    m.close()

from __future__ import annotations

import ast
import dataclasses
import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sympy.core.random
from sympy.core.cache import clear_cache

from asd_megatron.errors import UserError
from asd_megatron.records import Problem
from asd_megatron.reward import math as math_reward
from asd_megatron.reward import math_worker, workers
from asd_megatron.reward.math import MathVerifier

SLOW = r"\boxed{10^{10^{10}} + 1}"  # math-verify would evaluate it


@pytest.fixture(scope="module")
def verifier() -> Iterator[MathVerifier]:
    v = MathVerifier(timeout_seconds=20, workers=2)
    yield v
    v.close()


def problem(answer: str, name: str = "p") -> Problem:
    return Problem(name, answer, prompt="?")


def pids(verifier: MathVerifier) -> list[int]:
    return [w.process.pid for w in verifier._pool._workers]


RIGHT = [
    ("72", "thinking... #### 72"),
    ("72", "so 72.0 it is: #### 72.0"),
    ("1,072", r"\boxed{1072}"),
    ("1072", "#### $1,072"),
    ("0.5", r"\boxed{\frac{1}{2}}"),
    (r"\frac{1}{2}", r"\boxed{1/2}"),
    (r"\frac{1}{2}", r"\boxed{\dfrac12}"),
    ("3.5", r"\boxed{3\frac{1}{2}}"),
    ("3.5", "#### 3 1/2"),
    ("50%", r"\boxed{50\%}"),
    ("0.5", "#### 50%"),
    ("18", "#### 18 dollars"),
    ("150000", r"\boxed{1.5 \times 10^5}"),
    ("150000", "#### 1.5e5"),
    (r"\frac{\sqrt{2}}{2}", r"\boxed{\frac{1}{\sqrt{2}}}"),
    ("x^2+2x+1", r"\boxed{(x+1)^2}"),
    (r"(1, 2)", r"\boxed{(1,2)}"),
    (r"\{1, 2\}", r"\boxed{2, 1}"),
    ("1.6", r"=\boxed{1.6} \mathrm{~cm}"),
    ("B", r"\boxed{\text{B}}"),
    ("Sunday", r"\boxed{\text{Sunday}}"),
    ("5", r"first \boxed{4}, corrected \boxed{5}"),
    ("5", "The final answer is $5$."),  # no mark: what math-verify finds at the end
    ("27.0", "We get 27"),
    ("5", "word " * 200_000 + r"\boxed{5}"),
    # numbers in any spelling, marked or not
    ("3e6", "3e6"),
    ("3e6", "The answer is 3e6."),
    ("1.5e8", r"The answer is 1.5 \times 10^{8}."),
    ("1.5e8", r"It is $1.5 \times 10^{8}$ m"),
    ("3e8", "The answer is 3*10^8"),
    ("3e-8", "about 3 × 10⁻⁸ m"),
    ("6.02e23", r"\boxed{602000000000000000000000}"),
    ("602000000000000000000000", r"\boxed{6.02 \cdot 10^{23}}"),
    ("10000", r"The answer is $10\,000$."),
    (r"(10\,000, 1)", r"\boxed{(10000, 1)}"),
    ("+2", "We see that it is +2."),
    ("-1./3", r"\boxed{-\frac13}"),
    ("073", r"\boxed{\textbf{(073)}}"),
    ("B", r"\boxed{\textbf{(B)}}"),
    # what math-verify cannot read is compared as text
    ("12:00", r"\boxed{12:00}"),
    ("12:00", "12:00"),
    # where the answer is
    ("42", r"so \fbox{42}"),
    ("42", "Final answer: **42**"),
    ("42", "The answer is `42`."),
    ("42", "**#### 42**"),
    ("42", "<think>6 * 7</think><answer>42</answer>"),
    ("5", r'<Answer type="int">$\boxed{5}$</Answer>'),
    ("9", r"<think>\boxed{1}</think> hm <think>\boxed{2}</think> The answer is 9."),
    ("9", r"maybe \boxed{7}</think> The answer is 9."),
    (r"\{1, 2\}", r"\boxed{1} and \boxed{2}"),
    ("1,2", r"$x=\boxed{2}$, $x=\boxed{1}$"),
    ("2", r"\boxed{1} and \boxed{2}"),  # a single answer: the last box
    (r"\boxed{1} \text{ and } \boxed{2}", r"\boxed{1,2}"),
    ("34", "17 + 17 = 34, not 35.\nAnswer: 34"),
    ("5", "#### 5}"),
    (r"\frac12", r"#### \frac{1}{2"),
    (r"\frac{1}{2}", r"Final Answer: The final answer is $0.5$. I hope it is correct."),
    ("(1, 2)", "Answer: (1, 2)"),
    # Unicode
    (r"\infty", "\\boxed{\u221e}"),
    (r"\sqrt{2}", "#### \u221a2"),
    ("3 1/2", "#### 3\u00bd"),
    ("90", "#### 90\u00b0"),
    # precision
    ("1/3", "#### 0.333333"),
    (r"\frac{1}{12}", "#### 0.0833333"),
    (r"\sqrt{2}", "#### 1.414214"),
    (r"\frac{1}{2^{99}}", r"\boxed{2^{-99}}"),
    (r"10^{-20} \pi x", r"\boxed{x \pi / 10^{20}}"),
    ("1.6e-19", "#### 1.60e-19"),
    ("1.6e-400", "#### 16e-401"),
    (r"\begin{pmatrix} 1/3 \\ 2 \end{pmatrix}", r"\boxed{\begin{pmatrix} 0.333333 \\ 2 \end{pmatrix}}"),
    # infinities
    (r"\infty", r"\boxed{\lim_{x\to\infty} x}"),
    (r"\infty", r"\boxed{2\infty}"),
    ("0", r"\boxed{e^{-\infty}}"),
    (r"\frac{\pi^2}{6}", r"\boxed{\sum_{n=1}^{\infty} \frac{1}{n^2}}"),
    (r"(-\infty, 0.5) \cup (1, \infty)", r"\boxed{(1, +\infty) \cup (-\infty, \frac{1}{2})}"),
]
INFINITE = (
    *(r"\infty", r"-\infty", r"2\infty", r"\infty!", r"e^{\infty}", r"\sqrt{\infty}", r"\infty\%", r"x + \infty"),
    *(r"\ln 0", r"0^{-1}", r"\tan\frac{\pi}{2}", r"\lim_{x\to\infty} x", r"\lim_{x\to0} \frac{1}{x}"),
    *(r"\sum_{n=1}^{\infty} n", r"\sum_{n=1}^{\infty} \frac{1}{n}", r"\int_0^{\infty} x dx"),
)
WRONG = [
    ("72", "#### 73"),
    ("72", r"72, no: \boxed{27}"),
    ("0.5", r"\boxed{\frac{1}{3}}"),
    ("0.3333", r"\boxed{\frac{1}{3}}"),
    ("18", r"\boxed{17 or 18 or 19}"),  # listing candidates is not answering
    ("18", r"\boxed{17, 18}"),
    ("(1, 2)", r"\boxed{(2, 1)}"),
    ("5", ""),
    ("5", "   \n"),
    ("5", "####"),
    ("5", r"\boxed{}"),
    ("5", r"\boxed{" + "5+" * 5_000 + "5}"),
    ("5", "no number at all"),
    ("5", "\x00\ud83d"),
    ("x", "🙂" * 10_000),
    ("0", r"\boxed{10\,000}"),
    ("0", r"The answer is $10\,000$."),
    ("4140", "#### 12 345"),
    ("12:00", r"\boxed{12:30}"),
    ("42", r"first 42, then \fbox{7}"),
    ("5", r"I get \boxed{5}. Wait, that is wrong, it should be \boxed{7"),
    ("7", r"<think>maybe \boxed{7}? no</think> The answer is 9."),
    ("7", r"<think>maybe \boxed{7}? let me check"),
    ("18", "<answer>17 or 18 or 19</answer>"),
    ("18", "Answer: 17 or 18"),
    *(("18", text) for text in ("#### {17 or 18", "#### 17 } 18", "#### 17 or 18 \\", "<answer>{17, 18</answer>")),
    ("12", "The answer is 12. Wait, no.\nAnswer: 34"),
    ("1", r"\boxed{1} and \boxed{2}"),
    ("1,2", r"\boxed{1}, \boxed{2} and \boxed{3}"),
    ("(1, 2)", r"\boxed{1} and \boxed{2}"),
    # precision
    ("0.0000001", "#### 0.0000004"),
    ("0.0000001", "#### 0.0"),
    ("0", "#### 0.0000001"),
    ("6.6e-34", "#### 9.1e-31"),
    ("1.6e-19", "#### 1.602e-19"),
    ("1.6e-400", "#### 1.7e-400"),
    (r"\frac{1}{2^{99}}", r"\boxed{\frac{1}{2^{98}}}"),
    (r"10^{-20} \pi", r"\boxed{10^{-21} \pi}"),
    (r"10^{-20} x", r"\boxed{10^{-21} x}"),
    ("(0.0000001, 1)", r"\boxed{(0.0000002, 1)}"),
    ("0.0000005%", "#### 0.0000006%"),
    ("1/3", "#### 0.333"),
    (r"\frac{1}{12}", "#### 0.083333"),
    (r"\frac13", r"\boxed{\frac{333333}{1000000}}"),
    ("1234567", "#### 1234567.5"),
    ("99999999999999999999", r"\boxed{99999999999999999998}"),
    # infinities
    *((gold, r"\boxed{\infty}") for gold in ("72", "0", "3/4", "0.5", "50%", "x=5", r"\pi", r"-\infty")),
    *(("5", rf"\boxed{{{value}}}") for value in INFINITE),
    (r"\infty", r"\boxed{5}"),
    (r"\infty", r"\boxed{\infty - \infty}"),
    ("0.5", r"\boxed{\ln 0}"),
    ("(1, 2)", r"\boxed{(-\infty, \infty)}"),
    ("(1, 2, 3)", r"\boxed{(\infty, \infty, \infty)}"),
    (r"\{1, 2\}", r"\boxed{\{\infty, -\infty\}}"),
    (r"(-\infty, 1)", r"\boxed{(7, 1)}"),
    (r"[0, 1)", r"\boxed{[0, \infty)}"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\boxed{\begin{pmatrix} \infty \\ \infty \end{pmatrix}}"),
    ("5", r"It is $\infty$."),
]


def test_answers(verifier: MathVerifier) -> None:
    items = [(problem(gold), text) for gold, text in RIGHT + WRONG]
    rewards = verifier.score(items)
    expected = [1.0] * len(RIGHT) + [0.0] * len(WRONG)
    wrong = [case for case, is_, should in zip(RIGHT + WRONG, rewards, expected, strict=True) if is_ != should]
    assert not wrong
    assert verifier.counters == {"timeouts": 0, "errors": 0, "restarts": 0}
    assert verifier.score([]) == []
    with pytest.raises(UserError, match="problem p has none: give its line one"):
        verifier.score([(problem(" "), "5")])
    assert verifier.score([(problem("$"), "**")]) == [0.0]


def test_a_verdict_is_no_matter_of_chance() -> None:
    """sympy simplifies with points drawn at random; about 1 seed in 20 made a root of infinity equal to 5."""
    compare = math_worker.load_compare()
    for seed in range(40):
        sympy.core.random.seed(seed)
        clear_cache()
        assert not compare(r"\boxed{5}", r"\boxed{\sqrt{\infty}}"), seed


def test_workers_hold_no_torch_and_import_nothing_of_ours(verifier: MathVerifier) -> None:
    for file in (workers.PROGRAM, math_reward.JUDGE):
        source = ast.parse(file.read_text())
        names = {a.name for n in ast.walk(source) if isinstance(n, ast.Import) for a in n.names}
        names |= {n.module or "" for n in ast.walk(source) if isinstance(n, ast.ImportFrom)}
        assert {name.partition(".")[0] for name in names} - {"math_verify", "sympy"} <= set(sys.stdlib_module_names)
    for pid in pids(verifier):
        assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text()


def test_a_slow_answer_is_bounded_counted_and_its_worker_replaced(caplog: pytest.LogCaptureFixture) -> None:
    v = MathVerifier(timeout_seconds=1, wall_timeout_seconds=120, workers=1)
    try:
        before, start = pids(v), time.monotonic()
        rewards = v.score([(problem("0.5"), r"\boxed{1/2}"), (problem("5"), SLOW), (problem("0.25"), r"\boxed{1/4}")])
        assert time.monotonic() - start < 100
        assert rewards == [1.0, 0.0, 1.0]
        assert v.counters == {"timeouts": 1, "errors": 0, "restarts": 1} and pids(v) != before
        assert "1 s of processor time (reward.timeout_seconds)" in caplog.text
        with pytest.raises(ProcessLookupError):
            os.kill(before[0], 0)
    finally:
        v.close()


def test_waiting_is_bounded_by_wall_time_and_is_no_processor_time() -> None:
    v = MathVerifier(timeout_seconds=0.5, wall_timeout_seconds=60, workers=1)
    try:
        [pid] = pids(v)
        os.kill(pid, signal.SIGSTOP)  # as on a busy machine: time passes and the worker computes nothing
        threading.Timer(1.5, os.kill, (pid, signal.SIGCONT)).start()
        assert v.score([(problem("0.5"), r"\boxed{\frac{2}{4}}")]) == [1.0] and v.counters["timeouts"] == 0
        v._pool.limits = dataclasses.replace(v._pool.limits, wall_seconds=0.2)
        os.kill(pid, signal.SIGSTOP)
        assert v.score([(problem("0.5"), r"\boxed{\frac{3}{6}}")]) == [0.0] and v.counters["timeouts"] == 1
    finally:
        v.close()


def test_a_group_with_equal_answers_is_judged_once() -> None:
    v = MathVerifier(timeout_seconds=1, wall_timeout_seconds=120, workers=1)
    try:
        assert v.score([(problem("5"), SLOW)] * 8) == [0.0] * 8
        assert v.counters["timeouts"] == 1
    finally:
        v.close()


def test_works_in_a_thread(verifier: MathVerifier) -> None:
    rewards: list[float] = []
    thread = threading.Thread(target=lambda: rewards.extend(verifier.score([(problem("0.5"), r"\boxed{\frac24}")])))
    thread.start()
    thread.join(30)
    assert rewards == [1.0]


def test_a_worker_killed_from_outside_is_replaced(caplog: pytest.LogCaptureFixture) -> None:
    v = MathVerifier(timeout_seconds=20, workers=2)
    try:
        for pid in pids(v):
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.2)
        assert v.score([(problem("0.5"), rf"\boxed{{\frac{{{i}}}{{{2 * i}}}}}") for i in range(1, 5)]) == [1.0] * 4
        assert v.counters["restarts"] == 2 and v.counters["errors"] == 0
        assert "status -9" in caplog.text
    finally:
        v.close()


def test_memory_of_a_worker_is_bounded(verifier: MathVerifier) -> None:
    for pid in pids(verifier):
        limits = Path(f"/proc/{pid}/limits").read_text().splitlines()
        assert str(workers.MEMORY_BYTES) in next(line for line in limits if line.startswith("Max address space"))


def test_close_ends_the_workers() -> None:
    v = MathVerifier(workers=2)
    started = pids(v)
    v.close()
    v.close()
    for pid in started:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    with pytest.raises(UserError, match="closed already"):
        v.score([(problem("0.5"), r"\boxed{\frac12}")])


@pytest.mark.parametrize(
    ("kwargs", "key"),
    [
        ({"timeout_seconds": 0}, "reward.timeout_seconds"),
        ({"timeout_seconds": 2, "wall_timeout_seconds": 1}, "reward.wall_timeout_seconds"),
        ({"workers": 0}, "reward.workers"),
    ],
)
def test_unusable_settings(kwargs: dict[str, int], key: str) -> None:
    with pytest.raises(UserError, match=key):
        MathVerifier(**kwargs)


def test_an_error_of_math_verify_is_counted_and_does_not_hide_another_reading(verifier: MathVerifier) -> None:
    compare = math_worker.load_compare()
    grader = importlib.import_module("math_verify.grader")
    original = grader.sympy_expr_eq
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grader, "sympy_expr_eq", lambda *args, **kwargs: original(None, None, 6, 15).missing)
        assert compare(r"\boxed{x}", r"\boxed{x}")  # the text is the same
        with pytest.raises(AttributeError):
            compare(r"\boxed{x}", r"\boxed{y}")

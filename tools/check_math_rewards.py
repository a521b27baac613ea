r"""Measures the math reward (docs/rewards.md): reference solutions, published test cases, hostile answers, speed.

    python tools/check_math_rewards.py solutions FILE...     # problem files whose solutions must be right
    python tools/check_math_rewards.py cases FOLDER          # tests of an unpacked math-verify release
    python tools/check_math_rewards.py hostile               # 1,000 answers made to hang or to crash a verifier

Nothing of a test folder is run: the (gold, prediction, expected) triples are read from the source.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from asd_megatron.data.problems import load_problems
from asd_megatron.records import Problem
from asd_megatron.reward.answers import gold_answer, quick_verdict
from asd_megatron.reward.base import Response
from asd_megatron.reward.math import MathVerifier


def judged(responses: Sequence[Response], workers: int, timeout: float) -> tuple[list[float], Counter[str], float]:
    """The rewards, the failure counters, and the answers a second of processor time (this process's and workers')."""
    started = sum(os.times()[:4])
    verifier = MathVerifier(timeout_seconds=timeout, workers=workers)
    try:
        ready = time.process_time()
        rewards = verifier.score(responses)
        own = time.process_time() - ready
    finally:
        verifier.close()
    loading = _loading_seconds(workers)
    spent = max(sum(os.times()[:4]) - started - loading, own)
    return rewards, Counter(verifier.counters), len(responses) / spent


def _loading_seconds(workers: int) -> float:
    """Processor time of starting that many workers and the check of the installation."""
    started = sum(os.times()[:4])
    MathVerifier(workers=workers).close()
    return sum(os.times()[:4]) - started


def solutions(files: Sequence[Path], workers: int, timeout: float) -> int:
    """Each problem's own solution and boxed answer are right; with the next problem's they are wrong unless the two
    answers are equal. Returns how many are not."""
    faults = 0
    for file in files:
        problems = list(load_problems(file).problems)
        own = [Response(p, p.solution or rf"\boxed{{{p.answer}}}") for p in problems]
        boxed = [Response(p, rf"So the answer is $\boxed{{{p.answer}}}$.") for p in problems]
        others = [*own[1:], own[0]]
        swapped = [Response(p, other.text) for p, other in zip(problems, others, strict=True)]
        equal = [_same(p, other.problem) for p, other in zip(problems, others, strict=True)]
        rewards, counters, speed = judged([*own, *boxed, *swapped], workers, timeout)
        n = len(problems)
        right = [int(sum(rewards[k * n : (k + 1) * n])) for k in range(3)]
        print(
            f"{file.name}: {n} problems, solutions right {right[0]}, boxed answers right {right[1]}, with the next"
            f" problem's solution {right[2]} right (equal answers {sum(equal)}); {speed:.0f} answers a second and core;"
            f" {dict(counters)}"
        )
        expected = [1.0] * (2 * n) + [float(x) for x in equal]
        for response, reward, should in zip([*own, *boxed, *swapped], rewards, expected, strict=True):
            if reward != should:
                faults += 1
                print(
                    f"  reward {reward:g}: answer {response.problem.answer[:80]!r}, response {response.text[-120:]!r}"
                )
    return faults


def _same(one: Problem, other: Problem) -> bool:
    return bool(quick_verdict(gold_answer(one.answer), gold_answer(other.answer)))


def published(folder: Path) -> Iterator[tuple[str, str, str, bool]]:
    """(test function, gold, prediction, expected) of every parametrised test with these arguments under a folder."""
    for file in sorted(folder.rglob("test_*.py")):
        for node in ast.parse(file.read_text()).body:
            for mark in node.decorator_list if isinstance(node, ast.FunctionDef) else ():
                if not (isinstance(mark, ast.Call) and ast.unparse(mark.func).endswith("parametrize")):
                    continue
                names = [name.strip() for name in str(ast.literal_eval(mark.args[0])).split(",")]
                if names[:2] == ["gold", "pred"] and {"expected", "result"} & set(names):
                    at = next(i for i, name in enumerate(names) if name in ("expected", "result"))
                    assert isinstance(node, ast.FunctionDef)
                    for element in getattr(mark.args[1], "elts", ()):
                        with suppress(ValueError, TypeError, IndexError):  # built by a program: not of this list
                            row = ast.literal_eval(element)
                            if isinstance(row[0], str) and isinstance(row[1], str):
                                yield node.name, row[0], row[1], bool(row[at])


def cases(folder: Path, workers: int, timeout: float) -> int:
    """The published cases judged here: how many agree, and every difference."""
    rows = list(published(folder))
    responses = [Response(Problem(f"c{i}", gold, prompt="?"), pred) for i, (_, gold, pred, _) in enumerate(rows)]
    rewards, counters, _ = judged(responses, workers, timeout)
    differ = [(row, reward) for row, reward in zip(rows, rewards, strict=True) if reward != float(row[3])]
    print(f"{len(rows)} cases, {len(rows) - len(differ)} agree, {len(differ)} differ; {dict(counters)}")
    for (test, gold, pred, expected), reward in differ:
        print(f"  {test}: gold {gold[:150]!r}, prediction {pred[:150]!r}: expected {expected}, reward {reward:g}")
    return 0


def hostile(count: int, workers: int, timeout: float) -> int:
    """Answers that hang or crash parsers: every one is scored within its limits, and what was not judged is counted."""
    rng = random.Random(0)
    texts = [_hostile(rng, i) for i in range(count)]
    started = time.monotonic()
    rewards, counters, _ = judged([Response(Problem("p", "5", prompt="?"), t) for t in texts], workers, timeout)
    print(
        f"{count} answers in {time.monotonic() - started:.0f} s of wall time: {int(sum(rewards))} right,"
        f" {counters['timeouts']} timeouts, {counters['errors']} errors, {counters['restarts']} workers replaced"
    )
    return sum(r not in (0.0, 1.0) for r in rewards) + (len(rewards) != count)


def _hostile(rng: random.Random, i: int) -> str:
    """One answer of twenty kinds in turn. The right answer to all problems is 5; none of them is meant to be."""
    n = rng.choice((10, 100, 1_000, 5_000))
    huge = 2_000_000 if i % 200 < 20 else 20 * n
    big, word = (
        rng.randrange(10, 10**9),
        "".join(rng.choices("abcxyz+-*/^_{}()[]$\\& ,.0123456789", k=rng.randrange(1, 300))),
    )
    kinds = (
        lambda: "{" * n + "6" + "}" * n,
        lambda: "(" * n + "6" + ")" * n,
        lambda: r"\frac{1}{" * n + "6" + "}" * n,
        lambda: r"\sqrt{" * n + "6" + "}" * n,
        lambda: f"{big}^{{{big}^{{{big}}}}}",
        lambda: f"{big % 1000}!" + "!" * (n % 7),
        lambda: rf"\sum_{{k=1}}^{{{big}}} \frac{{1}}{{k^{n % 9}+1}}",
        lambda: rf"\int_0^{{{big}}} e^{{-x^{n % 13}}} \sin(x^{{{big}}}) dx",
        lambda: rf"\prod_{{k=1}}^{{{big}}} (1+\frac{{1}}{{k^2}})",
        lambda: r"\lim_{x \to 0} " + rf"\frac{{\sin(x^{{{big}}})}}{{x}}" * (n % 50 + 1),
        lambda: (
            r"\begin{pmatrix} " + r" \\ ".join([" & ".join(["1/3"] * (n % 30 + 2))] * (n % 30 + 2)) + r" \end{pmatrix}"
        ),
        lambda: "\x00" * n + "6\x1b[2J\ud83d\u202e",
        lambda: "".join(chr(rng.randrange(0x20, 0x2FFF)) for _ in range(n)),
        lambda: ("a" * 30 + "!") * n,
        lambda: "6" + " " * huge + "6",
        lambda: "9" * huge,
        lambda: "+".join(rf"\sqrt{{{k}}}" for k in range(2, n % 200 + 3)),
        lambda: rf"(x+{big})^{{{n}}} = x^{{{n}}}",
        lambda: r"\{" + ",".join(str(k) for k in range(n)) + r"\}",
        lambda: word,
    )
    text = kinds[i % len(kinds)]()
    return (rf"\boxed{{{text}}}", f"#### {text}", f"Answer: {text}", f"<answer>{text}</answer>", text)[i // 20 % 5]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("solutions", "cases", "hostile"))
    parser.add_argument("paths", nargs="*", type=Path)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=5.0, help="processor time of an answer, seconds")
    parser.add_argument("--count", type=int, default=1_000, help="hostile answers")
    options = parser.parse_args()
    if options.what == "hostile":
        return int(hostile(options.count, options.workers, options.timeout) > 0)
    if not options.paths:
        parser.error(f"{options.what} needs a path")
    if options.what == "cases":
        return cases(options.paths[0], options.workers, options.timeout)
    return int(solutions(options.paths, options.workers, options.timeout) > 0)


if __name__ == "__main__":
    sys.exit(main())

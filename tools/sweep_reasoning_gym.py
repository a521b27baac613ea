"""Try every task of reasoning-gym and print what is found of each; `--write`: into asd_megatron/gym/findings.json.

A task must make the same items in two processes with unlike hash seeds, and give its own answers the score 1 through
the verifier `reasoning_gym`. After it: `make docs`.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from asd_megatron.files import atomic_write
from asd_megatron.gym.stream import Task, item_of
from asd_megatron.gym.tasks import COMPOSITE, FINDINGS, registry
from asd_megatron.records import Problem
from asd_megatron.reward.base import Response
from asd_megatron.reward.reasoning_gym import ReasoningGymVerifier

SEED, ITEMS, SECONDS = 3_000_000, 12, 30
SLOW = 0.05  # seconds an item
LEAST_SHARE = 0.005  # smaller numbers in a verifier are tolerances
REFUSED = {
    "codeio": "making its items runs code snippets that nobody has checked",
    "intermediate_integration": "some of its own answers are the integral itself, not worked out",
}
EXAMPLES = ("possible_answer", "example_answer", "example_correct_answer")  # where items without an answer have one
PARAMETERS = {COMPOSITE: {"datasets": [{"name": "chain_sum", "weight": 1, "config": {}}]}}


def generate(tasks: Sequence[str]) -> dict[str, dict[str, Any]]:
    """By task: the digests of its items and the seconds of one, or why there are none."""
    signal.signal(signal.SIGVTALRM, _too_slow)
    registry()  # importing is nobody's time
    found: dict[str, dict[str, Any]] = {}
    for task in tasks:
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        started = time.process_time()
        try:
            problems = Task(task, PARAMETERS.get(task, {})).draw(SEED, ITEMS).problems
            found[task] = {"ids": [p.prompt_id for p in problems], "seconds": (time.process_time() - started) / ITEMS}
        except Exception as e:
            found[task] = {"failed": f"{type(e).__name__}: {e}"[:200]}
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    return found


def _too_slow(*_: Any) -> None:
    raise TimeoutError(f"{ITEMS} items take longer than {SECONDS} s")


def generated_apart(tasks: Sequence[str], hash_seed: str) -> dict[str, dict[str, Any]]:
    """`generate` in a process with a hash seed of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--generate", *tasks],
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def sweep(tasks: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The findings of each task, as the file has them."""
    one, two = generated_apart(tasks, "1"), generated_apart(tasks, "2")
    verifier = ReasoningGymVerifier(timeout_seconds=SECONDS, workers=2)
    try:
        return {task: _findings(task, one[task], two[task], verifier) for task in tasks}
    finally:
        verifier.close()


def _findings(task: str, one: dict[str, Any], two: dict[str, Any], verifier: ReasoningGymVerifier) -> dict[str, Any]:
    if task in REFUSED:
        return {"unusable": REFUSED[task]}
    if "failed" in one or "failed" in two:
        return {"unusable": one.get("failed") or two["failed"]}
    if one["ids"] != two["ids"]:
        return {"unusable": "its items differ from process to process (they depend on Python's hash seed)"}
    problems = Task(task, PARAMETERS.get(task, {})).draw(SEED, len(one["ids"])).problems
    own = verifier.score([Response(p, f"<answer>{text}</answer>") for p in problems if (text := _right_answer(p))])
    if any(score != 1 for score in own):
        return {"unusable": f"{own.count(1.0)} of {len(own)} of its own answers score 1"}
    others = [*problems[1:], problems[0]]
    probes = [
        Response(p, f"<answer>{text}</answer>")
        for p, other in zip(problems, others, strict=True)
        for text in (p.answer[:-1], f"{p.answer} x", other.answer, "0", "[1, 2]", "word")
    ]
    verifier_class = registry()[task][0]
    between = any(0 < score < 1 for score in verifier.score(probes)) or _names_a_share(verifier_class.score_answer)
    ours = "score_answer" in verifier_class.__dict__
    found = {
        "scores": "contains" if not ours else "partial" if between else "0 or 1",
        "slow": one["seconds"] > SLOW,
        "lines": any("\n" in p.answer for p in problems),
        "no_answer": not all(p.answer for p in problems),
    }
    return {name: value for name, value in found.items() if value is not False}


def _right_answer(problem: Problem) -> str:
    """The item's answer, else the example in its metadata; empty if it has neither."""
    examples = [value for name, value in item_of(problem)["metadata"].items() if name in EXAMPLES]
    example = examples[0] if examples else ""
    return problem.answer or (example if isinstance(example, str) else json.dumps(example))


def _names_a_share(verifier: Any) -> bool:
    """Whether a verifier's program has a number between 0 and 1 that may be a score."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(verifier)))
    numbers = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    return any(isinstance(n, float) and LEAST_SHARE <= n < 1 for n in numbers)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="*", help="tasks (default: all)")
    parser.add_argument("--write", action="store_true", help="write asd_megatron/gym/findings.json")
    parser.add_argument("--generate", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    tasks = arguments.tasks or sorted(registry())
    if arguments.generate:
        found = generate(tasks)
        print("\n" + json.dumps(found))
        return 0
    logging.disable(logging.WARNING)  # verifiers that fail on a wrong answer
    found = sweep(tasks)
    for task, about in found.items():
        print(task, json.dumps(about))
    if arguments.write:
        known = json.loads(FINDINGS.read_text())["tasks"] if FINDINGS.is_file() and arguments.tasks else {}
        content = {"reasoning_gym": version("reasoning-gym"), "tasks": dict(sorted({**known, **found}.items()))}
        atomic_write(FINDINGS, json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Tests per second of processor time in the sandbox of `reward.name: code`.

    python tools/benchmark_sandbox.py [--programs 40] [--python PATH]

Runs small programs with 1, 10 and 40 tests each: standard input, function calls, and asserts. Counts the processor time
of everything: the sandboxes and this process.
"""

from __future__ import annotations

import argparse
import resource
import time

from asd_megatron.records import Problem
from asd_megatron.reward.base import Response
from asd_megatron.reward.code import CodeVerifier

PROGRAM = """```python
from collections import Counter
import math
def total(numbers):
    return sum(numbers)
if __name__ == "__main__":
    print(total(map(int, input().split())))
```"""


def tests_of(form: str, count: int) -> list[dict[str, object]]:
    if form == "stdin":
        return [{"input": f"{i} 1\n", "output": f"{i + 1}\n"} for i in range(count)]
    if form == "function":
        return [{"function": "total", "arguments": [[i, 1]], "expected": i + 1} for i in range(count)]
    return [{"assert": f"assert total([{i}, 1]) == {i + 1}"} for i in range(count)]


def seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=40)
    parser.add_argument("--python")
    arguments = parser.parse_args()
    verifier = CodeVerifier(workers=2, python=arguments.python)
    print("| form | tests of a program | processor ms a program | tests a processor second | wall s |")
    print("|---|---|---|---|---|")
    for form in ("stdin", "function", "assert"):
        for count in (1, 10, 40):
            problems = [
                Problem(f"p{i}", "", prompt="", extra={"tests": tests_of(form, count)})
                for i in range(arguments.programs)
            ]
            began, wall = seconds(), time.monotonic()
            rewards = verifier.score([Response(problem, PROGRAM) for problem in problems])
            used, wall = seconds() - began, time.monotonic() - wall
            assert rewards == [1.0] * len(problems), rewards
            each = 1000 * used / len(problems)
            print(f"| {form} | {count} | {each:.0f} | {count * len(problems) / used:.0f} | {wall:.1f} |")


if __name__ == "__main__":
    main()

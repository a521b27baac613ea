"""One-step word problems with worked solutions, as problem files (docs/data.md).

    python examples/smollm2/make_problems.py [FOLDER] [--train N] [--test N]        (default: work/word_problems)

Writes `train.jsonl` and `test.jsonl` (fields `prompt`, `answer`, `solution`, `id`), and `gsm8k_style.jsonl`: the
training problems in the shape of GSM8K's files (`question`, `answer` with calculator marks and a last line `#### N`).
The same numbers give the same files, and no problem is in both sets.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asd_megatron.files import atomic_write

FOLDER = Path("work/word_problems")
NAMES = ("Tom", "Mia", "Ann", "Sam", "Lily", "Ben", "Jack", "Emma")
THINGS = ("apples", "books", "pens", "coins", "cards", "eggs")


@dataclass(frozen=True)
class WordProblem:
    question: str
    left: int
    sign: str
    right: int
    things: str

    @property
    def answer(self) -> int:
        return {"+": self.left + self.right, "-": self.left - self.right, "*": self.left * self.right}[self.sign]

    def line(self, problem_id: str) -> dict[str, Any]:
        """The problem as a line of a problem file."""
        solution = f"{self.left} {self.sign} {self.right} = {self.answer}. #### {self.answer}"
        return {"id": problem_id, "prompt": self.question, "answer": str(self.answer), "solution": solution}

    def gsm8k_line(self) -> dict[str, Any]:
        """The problem as a line of GSM8K's files."""
        left, sign, right, answer = self.left, self.sign, self.right, self.answer
        step = f"There are {left} {sign} {right} = <<{left}{sign}{right}={answer}>>{answer} {self.things}."
        return {"question": self.question, "answer": f"{step}\n#### {answer}"}


def draw(rng: random.Random) -> WordProblem:
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    a, b = rng.randint(10, 60), rng.randint(2, 9)
    kind = rng.choice("+-*")
    if kind == "+":
        return WordProblem(
            f"{name} has {a} {things} and buys {b} more. How many {things} does {name} have now?", a, "+", b, things
        )
    if kind == "-":
        return WordProblem(f"{name} had {a} {things} and gave away {b}. How many {things} are left?", a, "-", b, things)
    each = a % 10 + 2
    question = f"{name} has {b} bags with {each} {things} in each. How many {things} does {name} have?"
    return WordProblem(question, b, "*", each, things)


def make_problems(train: int, test: int, seed: int = 1) -> tuple[list[WordProblem], list[WordProblem]]:
    """Distinct problems: the test set first, so that it stays the same when more training problems are asked for."""
    rng = random.Random(seed)
    seen: dict[str, WordProblem] = {}
    while len(seen) < train + test:
        problem = draw(rng)
        seen.setdefault(problem.question, problem)
    problems = list(seen.values())
    return problems[test:], problems[:test]


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    atomic_write(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER)
    parser.add_argument("--train", type=int, default=512, help="training problems (512)")
    parser.add_argument("--test", type=int, default=64, help="held-out problems (64)")
    args = parser.parse_args()
    if not (args.train > 0 and args.test > 0 and args.train + args.test <= 20_000):
        parser.error(
            "--train and --test must be above 0 and at most 20000 together: there are not many more distinct problems"
        )
    train, test = make_problems(args.train, args.test)
    write_lines(args.folder / "train.jsonl", (p.line(f"train-{i}") for i, p in enumerate(train)))
    write_lines(args.folder / "test.jsonl", (p.line(f"test-{i}") for i, p in enumerate(test)))
    write_lines(args.folder / "gsm8k_style.jsonl", (p.gsm8k_line() for p in train))
    print(f"{args.folder}: {len(train)} training and {len(test)} held-out problems")


if __name__ == "__main__":
    main()

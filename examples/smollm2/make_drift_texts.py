"""Texts for tools/measure_fp8_drift.py: word problems and prose, each with and without a privileged context.

    python examples/smollm2/make_problems.py
    python examples/smollm2/make_drift_texts.py [FILE]        (default: work/drift_texts.jsonl)

Of a word problem the teacher sees the solution, of a passage of prose (this project's licence) the passage before it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from asd_megatron.files import atomic_write

FILE = Path("work/drift_texts.jsonl")
PROBLEMS = Path("work/word_problems/train.jsonl")
LICENSE = Path(__file__).parents[2] / "LICENSE"
COUNT = 24
EXAMPLES = """Question: Amy has 12 pens and buys 5 more. How many pens does she have?
Answer: 12 + 5 = 17. #### 17

Question: A box holds 6 eggs. How many eggs are in 4 boxes?
Answer: 6 * 4 = 24. #### 24

"""


def of_problems(path: Path) -> Iterator[dict[str, str]]:
    for line in path.read_text("utf-8").splitlines()[:COUNT]:
        problem = json.loads(line)
        question = f"Question: {problem['prompt']}\nAnswer:"
        answer = f" {problem['solution']}\n"
        teacher = f"{EXAMPLES}{question}{answer}\n{question}"
        yield {"prompt": EXAMPLES + question, "teacher_prompt": teacher, "response": answer}


def of_prose() -> Iterator[dict[str, str]]:
    words = re.sub(r"\s+", " ", LICENSE.read_text("utf-8")[1200:5200]).split(" ")
    for i in range(0, 480, 120):
        before, prompt, response = (" ".join(words[i + a : i + b]) for a, b in ((0, 60), (60, 90), (90, 150)))
        yield {"prompt": prompt, "teacher_prompt": f"{before} {prompt}", "response": f" {response}"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, default=FILE)
    parser.add_argument("--problems", type=Path, default=PROBLEMS)
    arguments = parser.parse_args()
    lines = [*of_problems(arguments.problems), *of_prose()]
    arguments.file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(arguments.file, "".join(json.dumps(line) + "\n" for line in lines))
    print(f"{arguments.file}: {len(lines)} texts")
    return 0


if __name__ == "__main__":
    sys.exit(main())

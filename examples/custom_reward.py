"""A reward of your own: 1 for a right answer after `####`, 0.5 for a right answer elsewhere.

    asd-megatron train RECIPE --reward.name examples/custom_reward.py:reward

Try it without a model:  python examples/custom_reward.py
"""

from __future__ import annotations

import re

from asd_megatron.records import Problem

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def reward(problem: Problem, response: str) -> float:
    """1 for the right number after `####`, 0.5 for the right number at the end without it, else 0.

    `problem` has `answer`, `solution` (or None), `question`, and in `extra` every other field of its line. `response`
    is the text that the model wrote, without special tokens. The function runs in a process of its own, which imports
    this file. A call that raises or takes longer than `reward.wall_timeout_seconds` stops the run, naming the problem
    (with `reward.on_error: zero` it scores 0, is counted and logged).
    """
    _, mark, tail = response.replace(",", "").rpartition("####")
    numbers = NUMBER.findall(tail)
    if not numbers or float(numbers[0 if mark else -1]) != float(problem.answer.replace(",", "")):
        return 0.0
    return 1.0 if mark else 0.5


# What the teacher's prompt says of the student's own response. `binary`, the default: "Your answer is correct." from
# privileged.success_threshold (1.0) up, else "Your answer is incorrect."; `fraction`: "Your code passes N of M test
# cases.", for a reward that is the fraction of the M test cases in the problem's field `tests`.
reward.feedback_kind = "binary"  # type: ignore[attr-defined]


if __name__ == "__main__":
    example = Problem("example", "17", prompt="Amy has 12 pens and buys 5 more. How many pens does she have?")
    for text in ("12 + 5 = 17. #### 17", "12 + 5 is 17", "12 - 5 = 7. #### 7", "No idea."):
        print(f"{reward(example, text):.1f}  {text}")

r"""The shapes of problem file that are read without conversion.

A file has one shape, recognised by the fields of its first line that are not null, in this order:

=============  ===========================  ==========================================================================
shape          first line has               read as
=============  ===========================  ==========================================================================
`canonical`    `prompt`, or `messages`      the fields' own names
               that end with a user turn
               beside `answer`
`competition`  `problem`                    prompt = `problem`; answer = `answer`, or without one the last
                                            `\boxed{}` of `solution`; solution = `solution`; id = `id`, else `idx`;
                                            `messages` (problem and response as chat turns) are dropped
`gsm8k`        `question`                   prompt = `question`; `answer` must end in a line `#### N`: answer = N,
                                            solution = all of `answer` without the calculator marks `<<...>>`;
                                            `messages` are dropped
`canonical`    `messages`                   the fields' own names
=============  ===========================  ==========================================================================

Each function takes a line's object and returns a canonical one, or raises LineError.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from asd_megatron.data.answers import HASHES, last_boxed, last_hashes
from asd_megatron.data.jsonl import LineError, ends_with_user_turn, optional_text_field, text_field

Line = dict[str, Any]
CALCULATOR = re.compile(r"<<[^<>\n]*>>")


def shape_of(line: Line) -> str:
    """The shape of a file whose first line is `line`. Raises LineError if it is none of them."""
    given = {name for name, value in line.items() if value is not None}
    other = given & {"problem", "question"}
    if "prompt" in given or ends_with_user_turn(line.get("messages")) and ("answer" in given or not other):
        return "canonical"
    for field, shape in (("problem", "competition"), ("question", "gsm8k"), ("messages", "canonical")):
        if field in given:
            return shape
    found = ", ".join(f"`{k}`" for k in line) or "none"
    raise LineError(f"no `prompt` or `messages` (fields: {found}); docs/data.md lists the fields of a problem file")


def canonical(line: Line) -> Line:
    """The line as it is."""
    return line


def competition(line: Line) -> Line:
    """A line with `problem`, and an `answer` or a `solution` that holds one."""
    problem, solution = text_field(line, "problem"), optional_text_field(line, "solution")
    if problem is None:
        raise LineError("`problem` is missing (the first line of this file has it)")
    out = {k: v for k, v in line.items() if k not in ("problem", "idx", "messages")}
    out["prompt"] = problem
    if line.get("id") is None and line.get("idx") is not None:
        out["id"] = line["idx"]
    if line.get("answer") is None or isinstance(line["answer"], str) and not line["answer"].strip():
        boxed = last_boxed(solution or "")
        if boxed is None or not boxed.content:
            raise LineError("no `answer`, and no `\\boxed{...}` in `solution` to take it from")
        out["answer"] = boxed.content
    return out


def gsm8k(line: Line) -> Line:
    """A line with `question`, and an `answer` that ends in `#### N`."""
    question, worked = text_field(line, "question"), text_field(line, "answer")
    if question is None or worked is None:
        raise LineError("`question` or `answer` is missing (the first line of this file is in GSM8K's shape)")
    answer = last_hashes(worked)
    if not answer:
        raise LineError(
            f"`answer` has no final line `{HASHES} N`; to give a plain answer name the fields `prompt` and `answer`"
        )
    out = {k: v for k, v in line.items() if k not in ("question", "answer", "solution", "messages")}
    return out | {"prompt": question, "answer": answer, "solution": CALCULATOR.sub("", worked).strip()}


SHAPES: Mapping[str, Callable[[Line], Line]] = {"canonical": canonical, "competition": competition, "gsm8k": gsm8k}

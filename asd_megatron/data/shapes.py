r"""The shapes of problem file that are read as they are.

A file has one shape, recognised by the fields of its first line.

=============  ===========================  ==========================================================================
shape          first line has               read as
=============  ===========================  ==========================================================================
`canonical`    `prompt` or `messages`       the fields' own names
`competition`  `problem`                    prompt = `problem`; answer = `answer`, or if the file has none the last
                                            `\boxed{}` of `solution`; solution = `solution`; id = `id`, else `idx`
`gsm8k`        `question`, no `problem`     prompt = `question`; `answer` must end in a line `#### N`: answer = N,
solution =
                                            the whole of `answer` without the calculator marks `<<...>>`
=============  ===========================  ==========================================================================

Each function takes a line's object and returns a canonical one, or raises LineError.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from asd_megatron.data.answers import HASHES, last_boxed, last_hashes
from asd_megatron.data.jsonl import LineError, text_field

Line = dict[str, Any]
CALCULATOR = re.compile(r"<<[^<>\n]*>>")


def shape_of(line: Line) -> str:
    """The shape of a file whose first line is `line`. Raises LineError if it is none of them."""
    if "prompt" in line or "messages" in line:
        return "canonical"
    if "problem" in line:
        return "competition"
    if "question" in line:
        return "gsm8k"
    found = ", ".join(f"`{k}`" for k in line) or "none"
    raise LineError(f"no `prompt` or `messages` (fields: {found}); docs/data.md lists the fields of a problem file")


def canonical(line: Line) -> Line:
    return line


def competition(line: Line) -> Line:
    problem, solution = text_field(line, "problem"), text_field(line, "solution")
    if problem is None:
        raise LineError("`problem` is missing (the first line of this file has it)")
    out = {k: v for k, v in line.items() if k not in ("problem", "idx")}
    out["prompt"] = problem
    if line.get("id") is None and line.get("idx") is not None:
        out["id"] = line["idx"]
    if line.get("answer") is None:
        boxed = last_boxed(solution or "")
        if boxed is None or not boxed.content:
            raise LineError("no `answer`, and no `\\boxed{...}` in `solution` to take it from")
        out["answer"] = boxed.content
    return out


def gsm8k(line: Line) -> Line:
    question, worked = text_field(line, "question"), text_field(line, "answer")
    if question is None or worked is None:
        raise LineError("`question` or `answer` is missing (the first line of this file is in GSM8K's shape)")
    answer = last_hashes(worked)
    if not answer:
        raise LineError(
            f"`answer` has no final line `{HASHES} N`; to give a plain answer name the fields `prompt` and `answer`"
        )
    out = {k: v for k, v in line.items() if k not in ("question", "answer", "solution")}
    return out | {"prompt": question, "answer": answer, "solution": CALCULATOR.sub("", worked).strip()}


SHAPES: Mapping[str, Callable[[Line], Line]] = {"canonical": canonical, "competition": competition, "gsm8k": gsm8k}

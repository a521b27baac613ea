r"""Finding the final answer in a response, and writing it so that math-verify reads the whole of it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from asd_megatron.data.answers import last_boxed, last_hashes

MAX_ANSWER_CHARS = 2_000  # a longer "answer" is none
TAIL_CHARS = 2_000  # where a response without a marked answer is searched

WRAPPERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))
INTEGER = re.compile(r"[-+]?\d{1,40}")
GROUPED = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+")
MIXED = re.compile(r"([-+]?\d+)\s+(\d+)\s*/\s*(\d+)")
SCIENTIFIC = re.compile(r"([-+]?\d+(?:\.\d+)?)[eE]([-+]?\d+)")
QUANTITY = re.compile(r"([-+]?\d[\d,]*(?:\.\d+)?(?:/\d+)?)\s+((?:[A-Za-z]{3,})(?: [A-Za-z]+){0,2})\.?")
NOT_UNITS = frozenset(
    [
        "and",
        "or",
        "half",
        "third",
        "quarter",
        "percent",
        "dozen",
        "hundred",
        "thousand",
        "million",
        "billion",
        "trillion",
        "to",
        "times",
        "plus",
        "minus",
    ]
)


@dataclass(frozen=True)
class Candidate:
    """`text` is the marked answer, or (marked False) the end of a response that marks none."""

    text: str
    marked: bool


def final_answer(response: str) -> Candidate | None:
    r"""The last `\boxed{...}`, else what follows the last `####`, else the tail; None if there is nothing to judge."""
    box = last_boxed(response)
    marked = last_hashes(response) if box is None else box.content
    if marked is None:
        tail = response[-TAIL_CHARS:].strip()
        return Candidate(tail, False) if tail else None
    if not marked or len(marked) > MAX_ANSWER_CHARS:
        return None
    return Candidate(tidy(marked), True)


def tidy(answer: str) -> str:
    r"""Plain spellings to LaTeX: `$1,234` is 1234, `50%` is `50\%`, `17 apples` is 17; also `3 1/2`, `1.5e5`."""
    text = answer.strip()
    for left, right in WRAPPERS:
        if text.startswith(left) and text.endswith(right) and len(text) > len(left) + len(right):
            text = text[len(left) : -len(right)].strip()
            break
    text = text.replace(r"\$", "").replace("$", "").removesuffix(".").strip()
    if GROUPED.fullmatch(text):
        return text.replace(",", "")
    if m := MIXED.fullmatch(text):
        return rf"{m[1]}\frac{{{m[2]}}}{{{m[3]}}}"
    if m := SCIENTIFIC.fullmatch(text):
        return rf"{m[1]} \times 10^{{{m[2]}}}"
    if (m := QUANTITY.fullmatch(text)) and not NOT_UNITS & set(m[2].lower().split()):
        return tidy(m[1])
    return re.sub(r"(?<!\\)%", r"\\%", text)


def gold_answer(answer: str) -> str:
    r"""A problem's answer, tidied; `\boxed{5}` and `#### 5` are read as 5."""
    box = last_boxed(answer)
    return tidy(box.content if box is not None else (last_hashes(answer) or answer))


def quick_verdict(gold: str, answer: str) -> bool | None:
    """Equality where it needs no algebra: the same text, or two whole numbers. None: not decided."""
    if gold == answer:
        return True
    if INTEGER.fullmatch(gold) and INTEGER.fullmatch(answer):
        return int(gold) == int(answer)
    return None

"""Markdown tables and numbers as a report writes them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from asd_megatron.study.statistics import Reached, Summary, is_number

NOTHING = "-"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> list[str]:
    """Lines of a Markdown table, padded; the first `left` columns are aligned left, the others right."""
    lines = [list(header), *[list(row) for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    rule = ["-" * max(w, 3) if i < left else "-" * max(w - 1, 2) + ":" for i, w in enumerate(widths)]
    padded = [
        [text.ljust(w) if i < left else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths, strict=True))]
        for line in lines
    ]
    return ["| " + " | ".join(line) + " |" for line in (padded[0], rule, *padded[1:])]


def decimals(values: Iterable[float | None]) -> int:
    """Digits after the point that suit all of `values`: 3 below 2, 2 below 10, 1 below 100, else 0."""
    largest = max((abs(v) for v in values if is_number(v)), default=0.0)
    return 3 if largest < 2 else 2 if largest < 10 else 1 if largest < 100 else 0


def number(value: float | None, digits: int, sign: bool = False) -> str:
    """`0.343`, `+0.343`; `-` for a value that is missing."""
    if not is_number(value):
        return NOTHING
    return f"{value:{'+' if sign else ''}.{digits}f}"


def spread(summary: Summary, digits: int, sign: bool = False) -> str:
    """`0.343 ± 0.012`; without the spread if there is none."""
    mean = number(summary.mean, digits, sign)
    return mean if not math.isfinite(summary.sd) else f"{mean} ± {number(summary.sd, digits)}"


def counted(summary: Summary, digits: int, usual: int, sign: bool = False) -> str:
    """`spread`, with the number of values where it is not the usual one."""
    text = spread(summary, digits, sign)
    return text if summary.n in (usual, 0) else f"{text} (n {summary.n})"


def when(times: Reached, digits: int) -> str:
    """Mean ± sd of the times of those that got there."""
    return spread(Summary(times.mean, times.sd, times.reached), digits)

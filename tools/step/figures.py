"""From measured seconds and counts to the figures that are shown: pure functions."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

BACKWARD = 2  # in forwards: two products for each of the forward's


@dataclass(frozen=True)
class Figure:
    """One line of the table. `target` None: shown, not judged."""

    name: str
    value: float
    unit: str = ""
    target: float | None = None
    bound: Literal["most", "least"] = "most"

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        return self.value <= self.target if self.bound == "most" else self.value >= self.target


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, extremes and spread (the middle half's width over the median) of measurements."""
    middle = statistics.median(values)
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (middle, middle, middle)
    return {
        "median": middle,
        "least": min(values),
        "most": max(values),
        "spread": (high - low) / middle if middle else 0.0,
        "count": len(values),
    }


def paired_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Median of the ratios of measurements that were made next to each other: what slows both cancels."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def forwards(scored: int, trained: int, batch: int) -> float:
    """Passes of a step in units of one student forward over its batch, from tokens that went through the model:
    `scored` without a gradient, `trained` with one (a backward each), `batch` of one student forward."""
    return (scored + (1 + BACKWARD) * trained) / batch


def padding_share(total: int, real: int) -> float:
    return 1.0 - real / total if total else 0.0


def phases(rows: Sequence[Mapping[str, Any]], seconds: Sequence[float]) -> dict[str, float]:
    """Median seconds of every `time/<phase>` of a run's metrics, and of what whole steps took beside them (`other`:
    examples, packs' columns, the gate, metrics and files)."""
    names = {name for row in rows for name in row if name.startswith("time/")} - {"time/total"}
    found = {name.partition("/")[2]: statistics.median(row.get(name, 0.0) for row in rows) for name in sorted(names)}
    parts = [sum(row.get(name, 0.0) for name in names) for row in rows]
    found["other"] = statistics.median(whole - part for whole, part in zip(seconds, parts, strict=True))
    return found


def table(figures: Sequence[Figure]) -> str:
    """A Markdown table, one line a figure."""
    lines = ["| figure | value | target | met |", "|---|---|---|---|"]
    for figure in figures:
        target = "" if figure.target is None else f"at {figure.bound} {figure.target:g}"
        met = {None: "", True: "yes", False: "no"}[figure.met]
        lines.append(f"| {figure.name} | {_shown(figure)} | {target} | {met} |")
    return "\n".join(lines)


def phase_table(columns: Mapping[str, Mapping[str, float]]) -> str:
    """Milliseconds of each phase, a column for each of `columns`; phases below a hundredth of every step are left
    out."""
    totals = {name: sum(parts.values()) for name, parts in columns.items()}
    rows = sorted({phase for parts in columns.values() for phase in parts})
    rows = [r for r in rows if any(parts.get(r, 0.0) > totals[name] / 100 for name, parts in columns.items())]
    lines = ["| ms a step | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        cells = [f"{1e3 * parts.get(row, 0.0):,.1f}" for parts in columns.values()]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _shown(figure: Figure) -> str:
    if figure.unit == "%":
        return f"{100 * figure.value:.2f}%"
    digits = f"{figure.value:,.0f}" if abs(figure.value) >= 1000 else f"{figure.value:.3g}"
    return f"{digits} {figure.unit}".strip()

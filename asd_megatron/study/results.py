"""What the finished cells of a study measured, by evaluation and by step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from asd_megatron.errors import UserError
from asd_megatron.files import atomic_write, to_json
from asd_megatron.observe.writer import read_metrics
from asd_megatron.study.cells import CellRecord
from asd_megatron.study.plan import CellKey
from asd_megatron.study.statistics import is_number

EVALUATION = "evaluation/"
BEHAVIOUR = (
    "evaluation/accuracy",
    "evaluation/length_mean",
    "reward/mean",
    "response/length_mean",
    "entropy/student_mean",
    "sft/loss",
)
"""Metrics of the trained model itself, which every condition has: equal ones mean equal weights."""
RESULTS_FILE = "results.jsonl"
NO_METRIC = ("step", "time_utc")


@dataclass(frozen=True)
class Point:
    """A cell at an evaluation. `seconds` of training have passed, evaluations not counted. A held-out metric is that
    evaluation's; any other is the mean over the steps since the evaluation before (those that have a number: `missing`
    counts the others)."""

    step: int
    seconds: float
    metrics: Mapping[str, float]
    missing: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class CellResult:
    """A finished cell: its points, and its metrics step by step (`rows` as in metrics.jsonl, `seconds` beside)."""

    key: CellKey
    points: Sequence[Point]
    rows: Sequence[Mapping[str, Any]]
    seconds: Sequence[float]

    def at(self, step: int, metric: str) -> float | None:
        """The metric at the evaluation after `step` steps; None if there is none."""
        return next((point.metrics.get(metric) for point in self.points if point.step == step), None)

    def seconds_at(self, step: int) -> float | None:
        return next((point.seconds for point in self.points if point.step == step), None)

    def column(self, metric: str) -> list[float | None]:
        return [point.metrics.get(metric) for point in self.points]


def trained_alike(one: CellResult, other: CellResult) -> bool:
    """Whether two cells did the same in every step: equal numbers in all of `BEHAVIOUR` that both have."""
    after = [[row for row in result.rows if row["step"] > 0] for result in (one, other)]
    if not after[0] or [row["step"] for row in after[0]] != [row["step"] for row in after[1]]:
        return False
    pairs = [(a[n], b[n]) for a, b in zip(*after, strict=True) for n in BEHAVIOUR if n in a and n in b]
    return bool(pairs) and all(a == b for a, b in pairs)


def training_seconds(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Seconds of training until the end of each row's step: the sum of `time/total` less `time/evaluate`."""
    out, total = [], 0.0
    for row in rows:
        spent = row.get("time/total")
        if spent is not None:
            total += spent - (row.get("time/evaluate") or 0.0)
        out.append(total)
    return out


def points(rows: Sequence[Mapping[str, Any]]) -> list[Point]:
    """One point for each row with held-out metrics, and one for the last row."""
    seconds = training_seconds(rows)
    found: list[Point] = []
    begin = 0
    for i, row in enumerate(rows):
        if i + 1 < len(rows) and not any(name.startswith(EVALUATION) for name in row):
            continue
        window = [r for r in rows[begin : i + 1] if r["step"] > 0]
        means, missing = _window_means(window)
        held_out = {n: float(v) for n, v in row.items() if n.startswith(EVALUATION) and is_number(v)}
        found.append(Point(row["step"], seconds[i], means | held_out, missing))
        begin = i + 1
    return found


def _window_means(rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, int]]:
    names = dict.fromkeys(n for row in rows for n in row if n not in NO_METRIC and not n.startswith(EVALUATION))
    means, missing = {}, {}
    for name in names:
        values = [float(row[name]) for row in rows if is_number(row.get(name))]
        if values:
            means[name] = math.fsum(values) / len(values)
        if len(values) < len(rows):
            missing[name] = len(rows) - len(values)
    return means, missing


def read_result(key: CellKey, run_folder: Path) -> CellResult:
    """A cell's numbers. Raises UserError without a metrics.jsonl that holds at least one step."""
    rows = read_metrics(run_folder)
    if not rows:
        raise UserError(
            f"{run_folder}/metrics.jsonl is empty though cell {key} is finished: remove its folder to run it again"
        )
    return CellResult(key, points(rows), rows, training_seconds(rows))


def finished(records: Iterable[tuple[CellKey, Path, CellRecord | None]]) -> list[CellResult]:
    """The results of those cells (key, run folder, record) that are finished."""
    return [
        read_result(key, folder)
        for key, folder, record in records
        if record is not None and record.status == "finished"
    ]


def write_results(folder: Path, results: Sequence[CellResult]) -> Path:
    """FOLDER/results.jsonl: one object a cell and evaluation, metrics by name, `missing` where steps had no number."""
    lines = []
    for result in results:
        key = {"arm": result.key.arm, "start": result.key.start, "seed": result.key.seed}
        for point in result.points:
            line = {**key, "step": point.step, "seconds": round(point.seconds, 4), **point.metrics}
            lines.append(to_json(line | ({"missing": point.missing} if point.missing else {})) + "\n")
    return atomic_write(folder / RESULTS_FILE, "".join(lines))

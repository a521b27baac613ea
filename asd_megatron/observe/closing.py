"""The closing report of a run: first and last values, the best step, paths of model and curves, one sample."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asd_megatron.observe.names import graded

COLUMNS = {
    "evaluation/accuracy": "held-out accuracy",
    "evaluation/length_mean": "held-out response length (tokens)",
    "reward/mean": "mean reward of training rollouts",
    "response/length_mean": "response length (tokens)",
    "entropy/student_mean": "student's entropy (nats)",
    "sft/loss": "cross-entropy (nats)",
}
"""The rows of the table, by metric; a run shows those it has. Held-out ones first."""
GRADED_COLUMNS = {
    "evaluation/accuracy": "held-out mean reward",
    "evaluation/pass_rate": "held-out pass rate",
    "evaluation/length_mean": COLUMNS["evaluation/length_mean"],
    "reward/mean": COLUMNS["reward/mean"],
    "reward/pass_rate": "pass rate of training rollouts",
    **{name: title for name, title in COLUMNS.items() if name != "evaluation/accuracy"},
}
"""The same for a run whose rewards are not only 0 and 1: its mean reward is no accuracy."""
OF_SET = re.compile(r"evaluation/([^/]+)/(avg@\d+)")
WINDOW = 10
"""Steps over which a training metric's first and last value are averaged."""
SAMPLE_CHARACTERS = 600


@dataclass(frozen=True)
class Sample:
    """A held-out problem with its last response."""

    prompt: str
    response: str
    reward: float


def closing_table(
    rows: Sequence[Mapping[str, Any]],
    *,
    run_folder: Path,
    model_folder: Path | None,
    curves: bool = True,
    sample: Sample | None = None,
) -> str:
    """The report as text. `rows`: the run's metrics.jsonl; `model_folder`: the last export, None without one;
    `curves`: whether curves.png was drawn."""
    columns = GRADED_COLUMNS if graded(rows) else COLUMNS
    lines = _before_and_after(rows, columns)
    if best := _best(rows):
        lines.append(f"best {columns['evaluation/accuracy']}: {best[1]:.3f} after step {best[0]}")
    lines.append(f"model:  {model_folder or 'not exported (checkpoint.export_at_end false)'}")
    drawn = run_folder / "curves.png" if curves else f"python tools/plot_run.py {run_folder} draws them"
    lines.append(f"curves: {drawn}    numbers: {run_folder / 'metrics.jsonl'}")
    if sample is not None:
        lines += ["", f"a held-out response (reward {sample.reward:g}):", *_quoted(sample.prompt, sample.response)]
    return "\n".join(lines)


def _before_and_after(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> list[str]:
    found: list[tuple[str, float, float]] = []
    sets = {m[0]: f"held-out {m[1]}, {m[2]}" for row in rows for m in map(OF_SET.fullmatch, row) if m is not None}
    for name, title in (sets | dict(columns)).items():
        values = [float(row[name]) for row in rows if isinstance(row.get(name), int | float)]
        if len(values) < 2:
            continue
        width = 1 if name.startswith("evaluation/") else max(1, min(WINDOW, len(values) // 2))
        found.append((title, sum(values[:width]) / width, sum(values[-width:]) / width))
    if not found:
        return []
    wide = max(len(title) for title, _, _ in found)
    lines = [f"{'':<{wide}} {'first':>9} {'last':>9}"]
    return lines + [f"{title:<{wide}} {first:>9.3f} {last:>9.3f}" for title, first, last in found]


def _best(rows: Sequence[Mapping[str, Any]]) -> tuple[int, float] | None:
    """(step, mean reward) of the best evaluation, the earliest of equal ones."""
    name = "evaluation/accuracy"
    found = [(int(row["step"]), float(row[name])) for row in rows if isinstance(row.get(name), int | float)]
    return max(found, key=lambda pair: (pair[1], -pair[0]), default=None)


def _quoted(prompt: str, response: str) -> list[str]:
    lines = []
    for text in (prompt, response):
        shown = text.strip()
        if len(shown) > SAMPLE_CHARACTERS:
            shown = f"{shown[: SAMPLE_CHARACTERS // 2]} ... {shown[-SAMPLE_CHARACTERS // 2 :]}"
        wrapped = [part for line in shown.splitlines() for part in textwrap.wrap(line, 110) or [""]]
        lines += [f"  | {line}" for line in wrapped] + ["  |"]
    return lines[:-1]

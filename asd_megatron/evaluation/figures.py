"""The two figures of an evaluation: pass@k of several models, and accuracy over steps of several runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from asd_megatron.errors import UserError
from asd_megatron.evaluation.intervals import Estimate
from asd_megatron.observe.drawing import CLASSES, draw_legend, dress, new_figure, save_figure

PASS_FILE, STEPS_FILE = "pass_at_k.png", "accuracy_over_steps.png"


@dataclass(frozen=True)
class PassCurve:
    """pass@k of one model on one set: (k, estimate), k rising."""

    label: str
    name: str
    points: Sequence[tuple[int, Estimate]]


def plot_pass_at_k(curves: Sequence[PassCurve], path: Path) -> Path:
    """A panel for each set, a curve with its 95% band for each model; k on a logarithmic axis."""
    names, labels = list(dict.fromkeys(c.name for c in curves)), list(dict.fromkeys(c.label for c in curves))
    figure, panels = _panels(len(names))
    for name, axis in zip(names, panels, strict=True):
        dress(axis)
        axis.set_title(f"pass@k, {name}", loc="left", fontsize=10)
        axis.set_xscale("log", base=2)
        axis.set_xlabel("k", fontsize=8)
        for curve in (c for c in curves if c.name == name):
            color = CLASSES[labels.index(curve.label) % len(CLASSES)]
            ks = [k for k, _ in curve.points]
            found = [e for _, e in curve.points]
            axis.plot(ks, [e.value for e in found], color=color, linewidth=1.7, marker=".", label=curve.label)
            if all(math.isfinite(e.low) for e in found):
                band = {"color": color, "alpha": 0.15, "linewidth": 0}
                axis.fill_between(ks, [e.low for e in found], [e.high for e in found], **band)
        ticks = sorted({k for c in curves if c.name == name for k, _ in c.points if k & (k - 1) == 0})
        axis.set_xticks(ticks, [str(k) for k in ticks])
        axis.minorticks_off()
        axis.set_ylim(bottom=0)
        draw_legend(axis, 2)
    return save_figure(figure, path)


@dataclass(frozen=True)
class StepCurve:
    """The mean reward of one run on one set after each evaluated step: step -> estimate (without an interval where it
    was measured during training)."""

    label: str
    name: str
    points: Mapping[int, Estimate] = field(default_factory=dict)

    @property
    def best(self) -> tuple[int, float] | None:
        """(step, value) of the best evaluation, the earliest of equal ones; None without any."""
        found = [(e.value, -step) for step, e in self.points.items() if math.isfinite(e.value)]
        return (-max(found)[1], max(found)[0]) if found else None

    def first_at_least(self, level: float) -> int | None:
        """The first evaluated step whose value is at least `level`; None if there is none."""
        return next((step for step in sorted(self.points) if self.points[step].value >= level), None)


def reached_text(base: StepCurve, other: StepCurve) -> str:
    """When `other` first reaches the baseline's best value, and how many times fewer steps that takes."""
    best = base.best
    if best is None:
        return f"{other.label}: nothing to compare with"
    step, value = best
    first = other.first_at_least(value)
    if first is None:
        return f"{other.label}: never reaches {base.label}'s best, {value:.3f} at step {step}"
    ratio = f", {step / first:.1f}x fewer steps" if 0 < first < step else ""
    return f"{other.label}: reaches {base.label}'s best, {value:.3f} at step {step}, first at step {first}{ratio}"


def plot_over_steps(curves: Sequence[StepCurve], path: Path) -> Path:
    """A panel for each set, a curve for each run. The first run is the baseline: a dashed line at its best value, and a
    ring where another run first reaches it. Raises UserError without any point."""
    curves = [curve for curve in curves if curve.points]
    if not curves:
        raise UserError("there is no evaluation to plot: evaluate during training (evaluation.every) or with --all")
    names, labels = list(dict.fromkeys(c.name for c in curves)), list(dict.fromkeys(c.label for c in curves))
    figure, panels = _panels(len(names))
    for name, axis in zip(names, panels, strict=True):
        dress(axis)
        axis.set_title(f"Accuracy, {name}", loc="left", fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.xaxis.get_major_locator().set_params(integer=True)
        of_set = [c for c in curves if c.name == name]
        base = of_set[0].best
        for curve in of_set:
            color = CLASSES[labels.index(curve.label) % len(CLASSES)]
            steps = sorted(curve.points)
            values = [curve.points[step].value for step in steps]
            axis.plot(steps, values, color=color, linewidth=1.7, marker=".", label=curve.label)
            bars = [(s, curve.points[s]) for s in steps if math.isfinite(curve.points[s].low)]
            if bars:
                low, high = [e.value - e.low for _, e in bars], [e.high - e.value for _, e in bars]
                where = ([s for s, _ in bars], [e.value for _, e in bars])
                axis.errorbar(*where, yerr=[low, high], fmt="none", color=color, alpha=0.5, linewidth=1)
            first = None if base is None or curve is of_set[0] else curve.first_at_least(base[1])
            if first is not None:
                ring = {"marker": "o", "markersize": 9, "markerfacecolor": "none", "markeredgecolor": color}
                axis.plot([first], [curve.points[first].value], linestyle="none", **ring)
                place = {"xytext": (6, -12), "textcoords": "offset points", "fontsize": 8, "color": color}
                axis.annotate(f"step {first}", (first, curve.points[first].value), **place)
        if base is not None and len(of_set) > 1:
            axis.axhline(base[1], color="black", linewidth=0.8, linestyle=(0, (4, 2)))
        draw_legend(axis, 2)
    return save_figure(figure, path)


def _panels(count: int) -> tuple[Any, list[Any]]:
    columns = min(3, count)
    rows = math.ceil(count / columns)
    figure = new_figure(4.6 * columns, 3.2 * rows)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[count:]:
        axis.remove()
    return figure, axes[:count]


def curves_of_metrics(label: str, rows: Iterable[Mapping[str, Any]]) -> list[StepCurve]:
    """The curves that a run's metrics.jsonl has: `test` of `evaluation/accuracy`, and each set's `avg@n`."""
    found: dict[str, dict[int, Estimate]] = {}
    for row in rows:
        for metric, value in row.items():
            name = _set_of(metric)
            if name is not None and isinstance(value, int | float):
                error = row.get(f"{metric}_se")
                error = float(error) if isinstance(error, int | float) else math.nan
                found.setdefault(name, {})[int(row["step"])] = Estimate(float(value), error)
    return [StepCurve(label, name, points) for name, points in found.items()]


def _set_of(metric: str) -> str | None:
    """The set whose mean reward the metric is; None for any other metric."""
    parts = metric.split("/")
    if metric == "evaluation/accuracy":
        return "test"
    of_set = len(parts) == 3 and parts[0] == "evaluation" and parts[2].startswith("avg@")
    return parts[1] if of_set and not parts[2].endswith("_se") else None

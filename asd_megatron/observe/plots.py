"""Curves of a run as small multiples (RUN/curves.png, from RUN/metrics.jsonl) and its summary (RUN/summary.json)."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from asd_megatron.errors import UserError
from asd_megatron.files import atomic_file, write_json
from asd_megatron.observe.writer import read_metrics

STUDENT, TEACHER, NEUTRAL, ACCENT, BESIDE = "#2563a8", "#d1622b", "#6b7280", "#2f8f5b", "#a2428f"
# colour-blind safe, in the order in which classes are drawn
CLASSES = ("#2563a8", "#d1622b", "#2f8f5b", "#a2428f", "#b0891c", "#4fa3c7", "#6b7280", "#8c4a2f", "#1f1f1f")
U_PREFIX = "puzzle/u_"


@dataclass(frozen=True)
class Curve:
    """One metric over the steps at which it is a number."""

    steps: np.ndarray
    values: np.ndarray

    def __bool__(self) -> bool:
        return len(self.steps) > 0


class Curves:
    """The run's metrics by name; `beside`: another run's, with its label, to compare with."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], beside: tuple[str, Curves] | None = None) -> None:
        self.rows, self.beside = rows, beside
        self.names = {name for row in rows for name, value in row.items() if isinstance(value, int | float)}
        self.last = max((row["step"] for row in rows), default=0)

    def __getitem__(self, name: str) -> Curve:
        points = [(row["step"], row[name]) for row in self.rows if isinstance(row.get(name), int | float)]
        array = np.asarray(points, dtype=np.float64).reshape(-1, 2)
        return Curve(array[:, 0], array[:, 1])

    def __contains__(self, name: str) -> bool:
        return name in self.names


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Centred running mean of odd width; at the ends the window keeps what lies inside the curve."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    first, last = np.maximum(at - width // 2, 0), np.minimum(at + width // 2 + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def _line(
    axis: Any, curve: Curve, color: str, label: str | None = None, style: str = "-", faint: float = 0.22
) -> np.ndarray:
    """The raw curve, faint, under its running mean (short curves as they are). Returns the running mean."""
    width = 2 * (len(curve.steps) // 50) + 1
    values = smooth(curve.values, width)
    if not curve:
        return values
    if width > 1 and faint:
        axis.plot(curve.steps, curve.values, color=color, alpha=faint, linewidth=0.8)
    marker = "." if len(curve.steps) == 1 else None
    axis.plot(curve.steps, values, style, color=color, linewidth=1.7, label=label, marker=marker)
    return values


def _beside(axis: Any, curves: Curves, metric: str, label: str = "", style: str = "-") -> None:
    """The compared run's curve, in the colour that no curve of the run itself has."""
    if curves.beside is not None and metric in curves.beside[1]:
        name, other = curves.beside
        _line(axis, other[metric], BESIDE, f"{name}{label}", style, faint=0)


def _legend(axis: Any, columns: int = 1) -> None:
    """A legend in a band of its own above the curves."""
    low, high = axis.get_ylim()
    rows = -(-len(axis.get_legend_handles_labels()[1]) // columns)
    axis.set_ylim(low, high + (high - low) * 0.095 * rows)
    style = {"frameon": False, "fontsize": 8, "handlelength": 1.6, "labelspacing": 0.25, "columnspacing": 1.2}
    axis.legend(loc="upper left", ncols=columns, borderaxespad=0.1, **style)


def spread_out(values: Sequence[float], gap: float) -> list[float]:
    """Rising `values` moved as little as possible (least squares) so that neighbours are at least `gap` apart."""
    blocks: list[tuple[float, int]] = []  # (mean, size) of value - i * gap: pool neighbours that would cross
    for i, value in enumerate(values):
        mean, size = value - i * gap, 1
        while blocks and blocks[-1][0] > mean:
            other, count = blocks.pop()
            mean, size = (mean * size + other * count) / (size + count), size + count
        blocks.append((mean, size))
    flat = [mean for mean, size in blocks for _ in range(size)]
    return [mean + i * gap for i, mean in enumerate(flat)]


def label_ends(axis: Any, ends: Sequence[tuple[str, str, float, float]]) -> None:
    """Names right of the curves' ends (name, colour, last x, last value), inside the panel."""
    low, high = axis.get_ylim()
    left, right = axis.get_xlim()
    axis.set_xticks([tick for tick in axis.get_xticks() if left <= tick <= right])
    axis.set_xlim(left, right + 0.42 * (right - left))
    ordered = sorted(ends, key=lambda end: end[3])
    places = spread_out([value for _, _, _, value in ordered], 0.07 * (high - low))
    for (name, color, x, value), place in zip(ordered, places, strict=True):
        at = right + 0.03 * (right - left)
        axis.plot([x, at], [value, place], color=color, linewidth=0.6)
        axis.text(at, place, f" {name}", color=color, fontsize=8, va="center")
    axis.set_ylim(min(low, *places), max(high, *places))


def _accuracy(axis: Any, curves: Curves) -> None:
    _line(axis, curves["reward/pass_rate"], NEUTRAL, "training rollouts")
    _beside(axis, curves, "evaluation/accuracy", ", held-out")
    held_out = curves["evaluation/accuracy"]
    if held_out:
        style = {"color": STUDENT, "linewidth": 1.7, "marker": "o", "markersize": 4.5, "clip_on": False}
        axis.plot(held_out.steps, held_out.values, "-", label="held-out", **style)
        for i in {0, len(held_out.steps) - 1}:
            text = f"{held_out.values[i]:.2f}"
            at = (held_out.steps[i], held_out.values[i])
            box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.5}
            place = {"xytext": (0, 7), "textcoords": "offset points", "ha": "center"}
            axis.annotate(text, at, fontsize=8, color=STUDENT, bbox=box, **place)
    axis.set_ylim(0, 1)
    _legend(axis, 2)
    axis.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])


def _reward(axis: Any, curves: Curves) -> None:
    _line(axis, curves["reward/mean"], STUDENT)


def _length(axis: Any, curves: Curves) -> None:
    _line(axis, curves["response/length_mean"], STUDENT, "training rollouts")
    _beside(axis, curves, "response/length_mean")
    held_out = curves["evaluation/length_mean"]
    if held_out:
        axis.plot(held_out.steps, held_out.values, "o", color=NEUTRAL, markersize=4.5, label="held-out")
    axis.set_ylim(bottom=0)
    if held_out or curves.beside is not None:
        _legend(axis, 2)


def _entropies(axis: Any, curves: Curves) -> None:
    for who, color in (("student", STUDENT), ("teacher", TEACHER)):
        _line(axis, curves[f"entropy/{who}_mean"], color, f"{who}, mean")
        _line(axis, curves[f"entropy/{who}_median"], color, f"{who}, median", "--", faint=0)
    _beside(axis, curves, "entropy/student_mean", ", student, mean")
    axis.set_ylim(bottom=0)
    _legend(axis, 2)


def _u(axis: Any, curves: Curves) -> None:
    names = sorted(n for n in curves.names if n.startswith(U_PREFIX))
    axis.axhline(0, color="black", linewidth=0.6)
    if names:
        ends = []
        for i, name in enumerate(names):
            color = CLASSES[i % len(CLASSES)]
            values = _line(axis, curves[name], color)
            ends.append((name.removeprefix(U_PREFIX).replace("_", " "), color, curves[name].steps[-1], values[-1]))
        label_ends(axis, ends)
    else:
        low, high = curves["pmi/q05"], curves["pmi/q95"]
        if low and len(low.steps) == len(high.steps):
            band = {"color": STUDENT, "alpha": 0.15, "linewidth": 0, "label": "5% to 95%"}
            axis.fill_between(low.steps, low.values, high.values, **band)
        _line(axis, curves["pmi/mean"], STUDENT, "mean")
        _line(axis, curves["pmi/q50"], STUDENT, "median", "--", faint=0)
        _legend(axis, 3)


def _gate(axis: Any, curves: Curves) -> None:
    """H against its two thresholds above, lambda below. The axis of H is logarithmic where H is far above both."""
    lower = axis.inset_axes([0, -0.02, 1, 0.2])
    upper = axis.inset_axes([0, 0.28, 1, 0.72])
    axis.axis("off")
    axis.set_title("", loc="left")
    for part in (upper, lower):
        dress(part)
    upper.set_title("Gate: median entropy (nats) and its thresholds", loc="left", fontsize=10)
    _line(upper, curves["gate/entropy"], TEACHER, "median entropy", faint=0.45)
    for name, style, label in (("gate/h_warm", "--", "opens from"), ("gate/close_below", ":", "closes below")):
        if curve := curves[name]:
            text = f"{label} {curve.values[-1]:.3g}"
            upper.plot(curve.steps, curve.values, style, color="black", linewidth=1.2, label=text, zorder=3)
    _show_thresholds(upper, curves)
    lam = curves["gate/lambda"]
    lower.fill_between(lam.steps, lam.values, step="mid", color=ACCENT, alpha=0.35, linewidth=0)
    lower.step(lam.steps, lam.values, where="mid", color=ACCENT, linewidth=1.4)
    lower.set_ylim(0, 1.2 * (lam.values.max(initial=0.0) or 1.0))
    lower.set_ylabel("lambda", fontsize=8)
    for part in (upper, lower):
        _steps(part, curves)
    upper.set_xlabel("")
    upper.tick_params(labelbottom=False)
    _legend(upper, 3)


def _lambda(axis: Any, curves: Curves) -> None:
    mean, low, high = (curves[f"lambda/{name}"] for name in ("mean", "min", "max"))
    axis.axhline(0, color="black", linewidth=0.6)
    if low and len(low.steps) == len(high.steps):
        band = {"color": ACCENT, "alpha": 0.2, "linewidth": 0, "label": "smallest to largest"}
        axis.fill_between(low.steps, low.values, high.values, **band)
    axis.step(mean.steps, mean.values, where="mid", color=ACCENT, linewidth=1.4, label="mean")
    _legend(axis, 2)


def _show_thresholds(axis: Any, curves: Curves) -> None:
    """Keep the thresholds apart from the bottom of the panel and, where H is many times as large, visible at all."""
    threshold, entropy = curves["gate/h_warm"], curves["gate/entropy"]
    if not threshold or not entropy:
        return
    level, positive = float(threshold.values[-1]), entropy.values[entropy.values > 0]
    if positive.size and level > 0 and positive.max() > 5 * level:
        axis.set_yscale("log")
        axis.set_ylim(0.5 * min(level, positive.min()), 3 * positive.max())


def _loss(axis: Any, curves: Curves) -> None:
    _line(axis, curves["sft/loss"], STUDENT)


def _grad_norm(axis: Any, curves: Curves) -> None:
    _line(axis, curves["optimizer/grad_norm"], STUDENT)
    axis.set_ylim(bottom=0)


def _speed(axis: Any, curves: Curves) -> None:
    _line(axis, curves["tokens/per_second"], STUDENT)
    axis.set_ylim(bottom=0)


def _equal(curves: Curves, one: str, other: str) -> bool:
    return np.array_equal(curves[one].values, curves[other].values)


@dataclass(frozen=True)
class Panel:
    """A panel is drawn when one of `needs` has a number (a trailing * stands for any ending)."""

    title: str
    needs: tuple[str, ...]
    draw: Callable[[Any, Curves], None]
    repeats: tuple[str, str] | None = None  # left out where these two metrics are equal: another panel shows one

    def wanted(self, curves: Curves) -> bool:
        return not (self.repeats and _equal(curves, *self.repeats)) and any(
            any(n.startswith(need[:-1]) for n in curves.names) if need.endswith("*") else need in curves
            for need in self.needs
        )


TRAINING_PANELS = (
    Panel("Accuracy", ("evaluation/accuracy", "reward/pass_rate"), _accuracy),
    Panel("Mean reward", ("reward/mean",), _reward, repeats=("reward/mean", "reward/pass_rate")),
    Panel("Response length (tokens)", ("response/length_mean",), _length),
    Panel("Entropy of the next token (nats)", ("entropy/student_mean", "entropy/teacher_mean"), _entropies),
    Panel("PMI u by token class, mean (nats)", (U_PREFIX + "*",), _u),
    Panel("PMI u = teacher - student log-prob (nats)", ("pmi/mean",), _u),
    Panel("Gate", ("gate/lambda",), _gate),
    Panel("Lambda of the responses", ("lambda/mean",), _lambda),
)
SUPERVISED_PANELS = (
    Panel("Cross-entropy (nats)", ("sft/loss",), _loss),
    Panel("Accuracy", ("evaluation/accuracy",), _accuracy),
    Panel("Gradient norm", ("optimizer/grad_norm",), _grad_norm),
    Panel("Tokens / s", ("tokens/per_second",), _speed),
)


def dress(axis: Any) -> None:
    """The look of every panel."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#e5e7eb", linewidth=0.7)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=8, length=3)


def _steps(axis: Any, curves: Curves) -> None:
    from matplotlib.ticker import MaxNLocator

    end = max(curves.last, 1)
    axis.set_xlim(-0.02 * end, 1.02 * end)
    axis.set_xlabel("step", fontsize=8)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))


def new_figure(width: float, height: float) -> Any:
    """A matplotlib figure of that size in inches, drawn without a screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Path) -> Path:
    """Atomically write `path` as PNG; returns it."""
    with atomic_file(path) as partial:
        figure.savefig(partial, format="png")
    return path


def _choose(curves: Curves) -> list[Panel]:
    panels = [p for p in (SUPERVISED_PANELS if "sft/loss" in curves else TRAINING_PANELS) if p.wanted(curves)]
    by_draw = {id(p.draw): p for p in reversed(panels)}  # u by class stands in for the overall u
    return [p for p in panels if by_draw[id(p.draw)] is p]


def plot_run(
    folder: str | os.PathLike[str],
    target: str | os.PathLike[str] | None = None,
    *,
    beside: tuple[str, str | os.PathLike[str]] | None = None,
) -> Path:
    """Draw RUN/curves.png (or `target`) from RUN/metrics.jsonl; returns its path. Works while the run is in progress.
    `beside` (label, folder): another run's held-out accuracy, length and entropy in the same panels.

    Raises UserError when there is no metrics.jsonl or no number to plot in it.
    """
    folder = Path(folder)
    other = None if beside is None else (beside[0], Curves(read_metrics(beside[1])))
    curves = Curves(read_metrics(folder), other)
    panels = _choose(curves)
    if not panels:
        raise UserError(f"{folder}/metrics.jsonl holds nothing to plot yet: wait for the first step")
    columns = min(3, len(panels)) if len(panels) != 4 else 2
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(4.1 * columns, 2.9 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis, panel in zip(axes, panels, strict=False):
        dress(axis)
        axis.set_title(panel.title, loc="left", fontsize=10)
        _steps(axis, curves)
        panel.draw(axis, curves)
    for axis in list(axes)[len(panels) :]:
        axis.remove()
    figure.suptitle(folder.resolve().name, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return save_figure(figure, folder / "curves.png" if target is None else Path(target))


def write_summary(folder: str | os.PathLike[str], summary: Mapping[str, Any]) -> Path:
    """Atomically write RUN/summary.json; returns its path."""
    return write_json(Path(folder) / "summary.json", summary)

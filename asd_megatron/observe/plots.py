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
from asd_megatron.observe.names import graded
from asd_megatron.observe.run_names import run_names
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
    """The metrics of the run `name`; `beside`: another run's, to compare with."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], name: str = "", beside: Curves | None = None) -> None:
        self.rows, self.name, self.beside = rows, name, beside
        self.names = {name for row in rows for name, value in row.items() if isinstance(value, int | float)}
        self.last: int = max((row["step"] for row in rows), default=0)
        # without a pass rate nothing tells rewards of 0 and 1 from others
        unknown = "reward/mean" in self.names and "reward/pass_rate" not in self.names
        self.graded: bool = graded(rows) or unknown or beside is not None and beside.graded
        if beside is not None:
            self.last = max(self.last, beside.last)

    def label(self, what: str = "") -> str | None:
        """The legend's name of a curve: what it shows, and of two runs which one's it is."""
        return ", ".join(filter(None, (self.name if self.beside is not None else "", what))) or None

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


def _beside(axis: Any, curves: Curves, metric: str, what: str = "", style: str = "-") -> None:
    """The compared run's curve, in the colour that no curve of the run itself has."""
    other = curves.beside
    if other is not None and metric in other:
        _line(axis, other[metric], BESIDE, f"{other.name}, {what}" if what else other.name, style, faint=0)


def _single(axis: Any, curves: Curves, metric: str, bottom: float | None = None) -> None:
    """A panel of one metric; with a legend where two runs are compared."""
    _line(axis, curves[metric], STUDENT, curves.label())
    _beside(axis, curves, metric)
    axis.set_ylim(bottom=bottom)
    if curves.beside is not None:
        _legend(axis, 2)


def _legend(axis: Any, columns: int = 1) -> None:
    """A legend in a band of its own above the curves, in at most so many columns as are not wider than the panel. None
    for a panel whose metrics have no number yet."""
    if not axis.get_legend_handles_labels()[1]:
        return
    renderer = axis.figure.canvas.get_renderer()
    panel = axis.get_window_extent(renderer)
    style = {"frameon": False, "handlelength": 1.6, "labelspacing": 0.25, "columnspacing": 1.2}
    for count, size in [*((count, 8.0) for count in range(columns, 0, -1)), (1, 7.0), (1, 6.0)]:
        legend = axis.legend(loc="upper left", ncols=count, fontsize=size, borderaxespad=0.1, **style)
        box = legend.get_window_extent(renderer)
        if box.width <= panel.width:
            break
    low, _ = axis.get_ylim()  # first: it brings the limits up to date
    fraction = (axis.transScale + axis.transLimits).inverted()  # of the panel to data, on logarithmic axes too
    band = min(0.6, box.height / panel.height)
    axis.set_ylim(low, fraction.transform((0, 1 / (1 - band)))[1])


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


def _rate(axis: Any, curves: Curves, training: str, evaluation: str) -> None:
    """Rewards of training rollouts and of held-out responses."""
    _line(axis, curves[training], NEUTRAL, curves.label("training rollouts"))
    other, held_out = curves.beside, curves[evaluation]
    if other is not None and evaluation in other:
        _beside(axis, curves, evaluation, "held-out")
    else:
        _beside(axis, curves, training, "training rollouts")
    if held_out:
        style = {"color": STUDENT, "linewidth": 1.7, "marker": "o", "markersize": 4.5, "clip_on": False}
        axis.plot(held_out.steps, held_out.values, "-", label=curves.label("held-out"), **style)
        for i in {0, len(held_out.steps) - 1}:
            text = f"{held_out.values[i]:.2f}"
            at = (held_out.steps[i], held_out.values[i])
            box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.5}
            place = {"xytext": (0, 7), "textcoords": "offset points", "ha": "center"}
            axis.annotate(text, at, fontsize=8, color=STUDENT, bbox=box, **place)


def _pass_rate(axis: Any, curves: Curves) -> None:
    """The fraction of responses that passed: where all rewards are 0 or 1, the mean reward."""
    _rate(axis, curves, "reward/pass_rate", "evaluation/pass_rate" if curves.graded else "evaluation/accuracy")
    axis.set_ylim(0, 1)
    _legend(axis, 2)
    axis.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])


def _reward(axis: Any, curves: Curves) -> None:
    _rate(axis, curves, "reward/mean", "evaluation/accuracy")
    _legend(axis, 2)


def _length(axis: Any, curves: Curves) -> None:
    _line(axis, curves["response/length_mean"], STUDENT, curves.label("training rollouts"))
    _beside(axis, curves, "response/length_mean", "training rollouts")
    held_out = curves["evaluation/length_mean"]
    if held_out:
        label = curves.label("held-out")
        axis.plot(held_out.steps, held_out.values, "o", color=NEUTRAL, markersize=4.5, label=label)
    axis.set_ylim(bottom=0)
    if held_out or curves.beside is not None:
        _legend(axis, 2)


def _entropies(axis: Any, curves: Curves) -> None:
    for who, color in (("student", STUDENT), ("teacher", TEACHER)):
        _line(axis, curves[f"entropy/{who}_mean"], color, curves.label(f"{who}, mean"))
        if curves.beside is None:
            _line(axis, curves[f"entropy/{who}_median"], color, f"{who}, median", "--", faint=0)
    for who, style in (("student", "-"), ("teacher", "--")):
        _beside(axis, curves, f"entropy/{who}_mean", f"{who}, mean", style)
    axis.set_ylim(bottom=0)
    _legend(axis, 2)


def _u_classes(axis: Any, curves: Curves) -> None:
    names = sorted(n for n in curves.names if n.startswith(U_PREFIX))
    axis.axhline(0, color="black", linewidth=0.6)
    ends = []
    for i, name in enumerate(names):
        color = CLASSES[i % len(CLASSES)]
        values = _line(axis, curves[name], color)
        ends.append((name.removeprefix(U_PREFIX).replace("_", " "), color, curves[name].steps[-1], values[-1]))
    label_ends(axis, ends)


def _u(axis: Any, curves: Curves) -> None:
    axis.axhline(0, color="black", linewidth=0.6)
    low, high = curves["pmi/q05"], curves["pmi/q95"]
    if curves.beside is None and low and len(low.steps) == len(high.steps):
        band = {"color": STUDENT, "alpha": 0.15, "linewidth": 0, "label": "5% to 95%"}
        axis.fill_between(low.steps, low.values, high.values, **band)
    _line(axis, curves["pmi/mean"], STUDENT, curves.label("mean"))
    if curves.beside is None:
        _line(axis, curves["pmi/q50"], STUDENT, "median", "--", faint=0)
    _beside(axis, curves, "pmi/mean", "mean")
    _legend(axis, 3)


def _means(axis: Any, curves: Curves, labels: Mapping[str, str]) -> None:
    """Metrics of one unit in one panel, by name and label; beside another run, the first of them."""
    first = next(iter(labels))
    for (name, label), color in zip(labels.items(), (STUDENT, TEACHER, NEUTRAL), strict=True):
        if curves.beside is None or name == first:
            _line(axis, curves[name], color, curves.label(label))
    _beside(axis, curves, first, labels[first])
    _legend(axis, 3)


def _divergence(axis: Any, curves: Curves) -> None:
    labels = {"divergence/mean": "D", "divergence/reverse_kl": "reverse KL", "divergence/forward_kl": "forward KL"}
    _means(axis, curves, labels)


def _kl(axis: Any, curves: Curves) -> None:
    _single(axis, curves, "kl/k3", bottom=0)  # the others estimate the same with more noise or bias


def _perplexity(axis: Any, curves: Curves) -> None:
    _means(axis, curves, {"perplexity/mean": "mean", "perplexity/median": "median", "perplexity/target": "target"})


def _gate(axis: Any, curves: Curves) -> None:
    """H against its two thresholds above, lambda below. The axis of H is logarithmic where H is far above both."""
    lower = axis.inset_axes([0, -0.02, 1, 0.2])
    upper = axis.inset_axes([0, 0.28, 1, 0.72])
    axis.axis("off")
    axis.set_title("", loc="left")
    for part in (upper, lower):
        dress(part)
    upper.set_title("Gate: median entropy (nats) and its thresholds", loc="left", fontsize=10)
    _line(upper, curves["gate/entropy"], TEACHER, curves.label("median entropy"), faint=0.45)
    _beside(upper, curves, "gate/entropy", "median entropy")
    for name, style, label in (("gate/h_warm", "--", "opens from"), ("gate/close_below", ":", "closes below")):
        if curve := curves[name]:
            text = f"{label} {curve.values[-1]:.3g}"
            upper.plot(curve.steps, curve.values, style, color="black", linewidth=1.2, label=text, zorder=3)
    _show_thresholds(upper, curves)
    lam = curves["gate/lambda"]
    lower.fill_between(lam.steps, lam.values, step="mid", color=ACCENT, alpha=0.35, linewidth=0)
    lower.step(lam.steps, lam.values, where="mid", color=ACCENT, linewidth=1.4)
    largest = lam.values.max(initial=0.0)
    if curves.beside is not None and (other := curves.beside["gate/lambda"]):
        lower.step(other.steps, other.values, where="mid", color=BESIDE, linewidth=1.0)
        largest = max(largest, other.values.max())
    lower.set_ylim(0, 1.2 * (largest or 1.0))
    lower.set_ylabel("lambda", fontsize=8)
    for part in (upper, lower):
        _steps(part, curves)
    upper.set_xlabel("")
    upper.tick_params(labelbottom=False)
    _legend(upper, 3)


def _lambda(axis: Any, curves: Curves) -> None:
    mean, low, high = (curves[f"lambda/{name}"] for name in ("mean", "min", "max"))
    axis.axhline(0, color="black", linewidth=0.6)
    if curves.beside is None and low and len(low.steps) == len(high.steps):
        band = {"color": ACCENT, "alpha": 0.2, "linewidth": 0, "label": "smallest to largest"}
        axis.fill_between(low.steps, low.values, high.values, **band)
    axis.step(mean.steps, mean.values, where="mid", color=ACCENT, linewidth=1.4, label=curves.label("mean"))
    _beside(axis, curves, "lambda/mean", "mean")
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
    _single(axis, curves, "sft/loss")


def _grad_norm(axis: Any, curves: Curves) -> None:
    _single(axis, curves, "optimizer/grad_norm", bottom=0)


def _speed(axis: Any, curves: Curves) -> None:
    _single(axis, curves, "tokens/per_second", bottom=0)


@dataclass(frozen=True)
class Panel:
    """A panel is drawn when one of `needs` has a number (a trailing * stands for any ending). `graded`: only with
    rewards that are not all 0 or 1 (True) or only where they are (False)."""

    title: str
    needs: tuple[str, ...]
    draw: Callable[[Any, Curves], None]
    graded: bool | None = None

    def wanted(self, curves: Curves) -> bool:
        return self.graded in (None, curves.graded) and any(
            any(n.startswith(need[:-1]) for n in curves.names) if need.endswith("*") else need in curves
            for need in self.needs
        )


# Where all rewards are 0 or 1, the mean reward is the pass rate: one panel, named accuracy.
REWARD_PANELS = (
    Panel("Accuracy", ("evaluation/accuracy", "reward/pass_rate"), _pass_rate, graded=False),
    Panel("Mean reward", ("evaluation/accuracy", "reward/mean"), _reward, graded=True),
    Panel("Pass rate", ("evaluation/pass_rate", "reward/pass_rate"), _pass_rate, graded=True),
)
TRAINING_PANELS = (
    *REWARD_PANELS,
    Panel("Response length (tokens)", ("response/length_mean",), _length),
    Panel("Entropy of the next token (nats)", ("entropy/student_mean", "entropy/teacher_mean"), _entropies),
    Panel("PMI u by token class, mean (nats)", (U_PREFIX + "*",), _u_classes),
    Panel("PMI u = teacher - student log-prob (nats)", ("pmi/mean",), _u),
    Panel("Gate", ("gate/lambda",), _gate),
    Panel("Lambda of the responses", ("lambda/mean",), _lambda),
    Panel("Teacher's perplexity of a response", ("perplexity/mean",), _perplexity),
    Panel("Divergence of student and teacher (nats)", ("divergence/mean",), _divergence),
    Panel("KL to the initial weights, k3 (nats)", ("kl/k3",), _kl),
)
SUPERVISED_PANELS = (
    Panel("Cross-entropy (nats)", ("sft/loss",), _loss),
    *REWARD_PANELS,
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
    """The panels of a run. The overall u is left out beside u by token class, unless two runs are compared in it."""
    panels = [p for p in (SUPERVISED_PANELS if "sft/loss" in curves else TRAINING_PANELS) if p.wanted(curves)]
    classes = any(panel.draw is _u_classes for panel in panels)
    compared = curves.beside is not None and "pmi/mean" in curves.beside
    return [panel for panel in panels if panel.draw is not _u or not classes or compared]


def plot_run(
    folder: str | os.PathLike[str],
    target: str | os.PathLike[str] | None = None,
    *,
    beside: str | os.PathLike[str] | None = None,
) -> Path:
    """Draw RUN/curves.png (or `target`) from RUN/metrics.jsonl; returns its path. Works while the run is in progress.
    `beside`: another run's folder; its curves are drawn in the panels of the metrics that both runs have.

    Raises UserError when there is no metrics.jsonl or no number to plot in it.
    """
    folder = Path(folder)
    names = run_names(folder) if beside is None else run_names(folder, beside)
    other = None if beside is None else Curves(read_metrics(beside), names[1])
    curves = Curves(read_metrics(folder), names[0], other)
    panels = _choose(curves)
    if not panels:
        raise UserError(f"{folder}/metrics.jsonl holds nothing to plot yet: wait for the first step")
    return save_figure(draw_panels(curves, panels), folder / "curves.png" if target is None else Path(target))


def draw_panels(curves: Curves, panels: Sequence[Panel]) -> Any:
    """The figure of a run's panels."""
    columns = min(3, len(panels)) if len(panels) != 4 else 2
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(4.1 * columns, 2.9 * rows)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, panel in zip(axes, panels, strict=False):
        dress(axis)
        axis.set_title(panel.title, loc="left", fontsize=10)
        _steps(axis, curves)
        panel.draw(axis, curves)
    for axis in axes[len(panels) :]:
        axis.remove()
    title = curves.name if curves.beside is None else f"{curves.name} and {curves.beside.name}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure


def write_summary(folder: str | os.PathLike[str], summary: Mapping[str, Any]) -> Path:
    """Atomically write RUN/summary.json; returns its path."""
    return write_json(Path(folder) / "summary.json", summary)

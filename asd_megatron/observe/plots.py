"""Curves of a run as small multiples: RUN/curves.png, from RUN/metrics.jsonl."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asd_megatron.errors import UserError
from asd_megatron.observe.curves import Curves
from asd_megatron.observe.drawing import (
    ACCENT,
    BESIDE,
    CLASSES,
    NEUTRAL,
    STUDENT,
    TEACHER,
    draw_beside,
    draw_legend,
    draw_line,
    dress,
    label_ends,
    new_figure,
    save_figure,
    step_axis,
)
from asd_megatron.observe.run_names import run_names
from asd_megatron.observe.writer import read_metrics

U_PREFIX = "puzzle/u_"


def _single(axis: Any, curves: Curves, metric: str, bottom: float | None = None) -> None:
    """A panel of one metric; with a legend where two runs are compared."""
    draw_line(axis, curves[metric], STUDENT, curves.label())
    draw_beside(axis, curves, metric)
    axis.set_ylim(bottom=bottom)
    if curves.beside is not None:
        draw_legend(axis, 2)


def _rate(axis: Any, curves: Curves, training: str, evaluation: str) -> None:
    """Rewards of training rollouts and of held-out responses."""
    draw_line(axis, curves[training], NEUTRAL, curves.label("training rollouts"))
    other, held_out = curves.beside, curves[evaluation]
    if other is not None and evaluation in other:
        draw_beside(axis, curves, evaluation, "held-out")
    else:
        draw_beside(axis, curves, training, "training rollouts")
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
    draw_legend(axis, 2)
    axis.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])


def _reward(axis: Any, curves: Curves) -> None:
    _rate(axis, curves, "reward/mean", "evaluation/accuracy")
    draw_legend(axis, 2)


def _length(axis: Any, curves: Curves) -> None:
    draw_line(axis, curves["response/length_mean"], STUDENT, curves.label("training rollouts"))
    draw_beside(axis, curves, "response/length_mean", "training rollouts")
    held_out = curves["evaluation/length_mean"]
    if held_out:
        label = curves.label("held-out")
        axis.plot(held_out.steps, held_out.values, "o", color=NEUTRAL, markersize=4.5, label=label)
    axis.set_ylim(bottom=0)
    if held_out or curves.beside is not None:
        draw_legend(axis, 2)


def _entropies(axis: Any, curves: Curves) -> None:
    for who, color in (("student", STUDENT), ("teacher", TEACHER)):
        draw_line(axis, curves[f"entropy/{who}_mean"], color, curves.label(f"{who}, mean"))
        if curves.beside is None:
            draw_line(axis, curves[f"entropy/{who}_median"], color, f"{who}, median", "--", faint=0)
    for who, style in (("student", "-"), ("teacher", "--")):
        draw_beside(axis, curves, f"entropy/{who}_mean", f"{who}, mean", style)
    axis.set_ylim(bottom=0)
    draw_legend(axis, 2)


def _u_classes(axis: Any, curves: Curves) -> None:
    names = sorted(n for n in curves.names if n.startswith(U_PREFIX))
    axis.axhline(0, color="black", linewidth=0.6)
    ends = []
    for i, name in enumerate(names):
        color = CLASSES[i % len(CLASSES)]
        values = draw_line(axis, curves[name], color)
        ends.append((name.removeprefix(U_PREFIX).replace("_", " "), color, curves[name].steps[-1], values[-1]))
    label_ends(axis, ends)


def _u(axis: Any, curves: Curves) -> None:
    axis.axhline(0, color="black", linewidth=0.6)
    low, high = curves["pmi/q05"], curves["pmi/q95"]
    if curves.beside is None and low and len(low.steps) == len(high.steps):
        band = {"color": STUDENT, "alpha": 0.15, "linewidth": 0, "label": "5% to 95%"}
        axis.fill_between(low.steps, low.values, high.values, **band)
    draw_line(axis, curves["pmi/mean"], STUDENT, curves.label("mean"))
    if curves.beside is None:
        draw_line(axis, curves["pmi/q50"], STUDENT, "median", "--", faint=0)
    draw_beside(axis, curves, "pmi/mean", "mean")
    draw_legend(axis, 3)


def _means(axis: Any, curves: Curves, labels: Mapping[str, str]) -> None:
    """Metrics of one unit in one panel, by name and label; beside another run, the first of them."""
    first = next(iter(labels))
    for (name, label), color in zip(labels.items(), (STUDENT, TEACHER, NEUTRAL), strict=True):
        if curves.beside is None or name == first:
            draw_line(axis, curves[name], color, curves.label(label))
    draw_beside(axis, curves, first, labels[first])
    draw_legend(axis, 3)


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
    draw_line(upper, curves["gate/entropy"], TEACHER, curves.label("median entropy"), faint=0.45)
    draw_beside(upper, curves, "gate/entropy", "median entropy")
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
        step_axis(part, curves)
    upper.set_xlabel("")
    upper.tick_params(labelbottom=False)
    draw_legend(upper, 3)


def _lambda(axis: Any, curves: Curves) -> None:
    mean, low, high = (curves[f"lambda/{name}"] for name in ("mean", "min", "max"))
    axis.axhline(0, color="black", linewidth=0.6)
    if curves.beside is None and low and len(low.steps) == len(high.steps):
        band = {"color": ACCENT, "alpha": 0.2, "linewidth": 0, "label": "smallest to largest"}
        axis.fill_between(low.steps, low.values, high.values, **band)
    axis.step(mean.steps, mean.values, where="mid", color=ACCENT, linewidth=1.4, label=curves.label("mean"))
    draw_beside(axis, curves, "lambda/mean", "mean")
    draw_legend(axis, 2)


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
        step_axis(axis, curves)
        panel.draw(axis, curves)
    for axis in axes[len(panels) :]:
        axis.remove()
    title = curves.name if curves.beside is None else f"{curves.name} and {curves.beside.name}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure

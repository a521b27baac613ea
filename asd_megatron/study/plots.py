"""FOLDER/plots/*.png: what the arms' cells did, mean and spread, by step and by training seconds."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from asd_megatron.errors import plural
from asd_megatron.observe.curves import smooth
from asd_megatron.observe.drawing import CLASSES, dress, label_ends, new_figure, save_figure
from asd_megatron.observe.names import METRICS
from asd_megatron.study.report import Findings
from asd_megatron.study.results import EVALUATION, CellResult
from asd_megatron.study.statistics import Floats, is_number, mean_and_sd, resample

POINTS = 200  # of a curve
SMOOTHING = 20  # a step's metric is averaged over about 1 / SMOOTHING of the steps
FOREMOST = 3  # arms of the file that are drawn with a thick line
AXES = {"step": "step", "seconds": "training seconds"}
PLOTS_FOLDER = "plots"


def curve(result: CellResult, metric: str, axis: str) -> tuple[list[float], list[float]]:
    """The metric of one cell over steps or training seconds: held-out metrics as they are, others as running means."""
    kept = [i for i, row in enumerate(result.rows) if is_number(row.get(metric))]
    values = np.asarray([result.rows[i][metric] for i in kept], dtype=np.float64)
    if not metric.startswith(EVALUATION):
        values = smooth(values, 2 * (len(values) // (2 * SMOOTHING)) + 1)
    x = [float(result.rows[i]["step"]) if axis == "step" else result.seconds[i] for i in kept]
    return x, values.tolist()


def arm_curve(results: Sequence[CellResult], metric: str, axis: str) -> tuple[Floats, Floats, Floats] | None:
    """Grid, mean and sd over those cells that have the metric, as far as all of these reach; None without any."""
    curves = [(x, y) for x, y in (curve(result, metric, axis) for result in results) if x]
    if not curves:
        return None
    first, last = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    if last < first:
        return None
    shared = set.intersection(*(set(x) for x, _ in curves))
    even = np.linspace(first, last, POINTS)
    grid = np.asarray(sorted(shared)) if axis == "step" and len(shared) > 1 else even
    return grid, *mean_and_sd([resample(x, y, grid) for x, y in curves])


def plot_study(findings: Findings) -> list[Path]:
    """Draw every plotted metric that a finished cell has; returns the paths, an overview of all metrics first."""
    study = findings.study
    there = {name for result in findings.results for row in result.rows for name, v in row.items() if is_number(v)}
    metrics = without_repeats([metric for metric in study.plot if metric in there], findings)
    folder = study.path / PLOTS_FOLDER
    paths = []
    if len(metrics) > 1:
        for axis in AXES:
            paths.append(_overview(findings, metrics, axis, folder / f"overview_by_{axis}.png"))
    for metric in metrics:
        paths.append(_metric(findings, metric, folder / f"{metric.replace('/', '_')}.png"))
    return paths


def without_repeats(metrics: Sequence[str], findings: Findings) -> list[str]:
    """The metrics less those that have, in every step of every cell, the value of one before them."""
    kept: dict[tuple[object, ...], str] = {}
    for metric in metrics:
        values = tuple(row.get(metric) for result in findings.results for row in result.rows)
        kept.setdefault(values, metric)
    return list(kept.values())


def title(metric: str, width: int = 52) -> str:
    """A panel's title in words: the metric's meaning and unit."""
    found = next((m for m in METRICS if m.matches(metric)), None)
    if found is None:
        return metric
    meaning = found.meaning if "<" not in found.name else f"{found.meaning} [{metric.rpartition('_')[2]}]"
    unit = "" if found.unit == "1" else f" ({found.unit})"
    return "\n".join(textwrap.wrap(meaning.split(";")[0][:1].upper() + meaning.split(";")[0][1:] + unit, width))


def _overview(findings: Findings, metrics: Sequence[str], axis: str, path: Path) -> Path:
    """Small multiples, one panel a metric."""
    columns = min(3, len(metrics))
    rows = math.ceil(len(metrics) / columns)
    figure = new_figure(4.1 * columns, 2.7 * rows + 0.5)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel, metric in zip(axes, metrics, strict=False):
        _draw(panel, findings, metric, axis)
        panel.set_title(title(metric), loc="left", fontsize=9)
    for panel in axes[len(metrics) :]:
        panel.remove()
    _key(figure, findings)
    return save_figure(figure, path)


def _metric(findings: Findings, metric: str, path: Path) -> Path:
    """One metric: all arms over steps and over seconds above, then a panel an arm with its single cells."""
    arms = [arm for arm in findings.arms if arm_curve(findings.of(arm), metric, "step") is not None]
    columns = min(4, max(2, len(arms)))
    rows = math.ceil(len(arms) / columns)
    figure = new_figure(3.1 * columns, 3.3 + 2.2 * rows)
    upper, lower = figure.subfigures(2, 1, height_ratios=[3.3, 2.2 * rows])
    for axis, panel in zip(AXES, upper.subplots(1, 2, squeeze=False).flat, strict=True):
        ends = _draw(panel, findings, metric, axis)
        if ends:
            label_ends(panel, ends)
    upper.suptitle(title(metric, 100), x=0.01, ha="left", fontsize=11, fontweight="bold")
    panels = list(lower.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
    for arm, panel in zip(arms, panels, strict=False):
        _arm(panel, findings, arm, metric)
    for panel in panels[len(arms) :]:
        panel.remove()
    return save_figure(figure, path)


def _draw(panel: Any, findings: Findings, metric: str, axis: str) -> list[tuple[str, str, float, float]]:
    """Every arm's mean with its band; returns (arm, colour, x, y) of the curves' ends.

    Arms lie on top in the file's order. The baseline is dashed above all of them, so that an arm that it coincides with
    can still be seen.
    """
    dress(panel)
    panel.set_xlabel(AXES[axis], fontsize=8)
    ends = []
    for place, arm in enumerate(findings.arms):
        found = arm_curve(findings.of(arm), metric, axis)
        if found is None:
            continue
        grid, mean, sd = found
        color = _color(findings, arm)
        panel.fill_between(grid, mean - sd, mean + sd, color=color, alpha=0.13, linewidth=0)
        baseline = arm == findings.study.baseline_arm
        style = {"linestyle": (0, (4, 1.5)), "zorder": 4.0} if baseline else {"zorder": 3.0 - 0.01 * place}
        width = 2.0 if place < FOREMOST else 1.1
        panel.plot(grid, mean, color=color, linewidth=width, marker="." if len(grid) < 3 else None, **style)
        ends.append((arm, color, float(grid[-1]), float(mean[-1])))
    return ends


def _arm(panel: Any, findings: Findings, arm: str, metric: str) -> None:
    """One arm's cells, thin, with their mean, and the mean of the baseline's cells of the same starts and seeds."""
    dress(panel)
    panel.set_xlabel(AXES["step"], fontsize=8)
    color, baseline, cells = _color(findings, arm), findings.study.baseline_arm, findings.of(arm)
    for result in cells:
        x, y = curve(result, metric, "step")
        panel.plot(x, y, color=color, linewidth=0.7, alpha=0.45)
    pairs = {(result.key.start, result.key.seed) for result in cells}
    matched = [result for result in findings.of(baseline) if (result.key.start, result.key.seed) in pairs]
    for results, style in (
        (matched, {"color": "black", "linewidth": 1.0, "linestyle": ":"}),
        (cells, {"color": color, "linewidth": 1.8}),
    ):
        found = arm_curve(results, metric, "step")
        if found is not None:
            panel.plot(found[0], found[1], **style)
    beside = "" if arm == baseline else f" (dotted: {baseline})"
    panel.set_title(f"{arm}, {plural(len(cells), 'cell')}{beside}", loc="left", fontsize=8)


def _color(findings: Findings, arm: str) -> str:
    return CLASSES[list(findings.study.arms).index(arm) % len(CLASSES)]


def _key(figure: Any, findings: Findings) -> None:
    """The arms' colours, above the panels."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=_color(findings, arm), linewidth=2, label=arm) for arm in findings.arms]
    figure.legend(handles=handles, loc="outside upper left", ncols=min(8, len(handles)), frameon=False, fontsize=9)

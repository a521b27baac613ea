"""Drawing with matplotlib: colours, the look of a panel, curves with running means, legends, names at curves' ends."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from asd_megatron.files import atomic_file
from asd_megatron.observe.curves import Curve, Curves, smooth

STUDENT, TEACHER, NEUTRAL, ACCENT, BESIDE = "#2563a8", "#d1622b", "#6b7280", "#2f8f5b", "#a2428f"
# colour-blind safe, in the order in which classes are drawn
CLASSES = ("#2563a8", "#d1622b", "#2f8f5b", "#a2428f", "#b0891c", "#4fa3c7", "#6b7280", "#8c4a2f", "#1f1f1f")


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


def dress(axis: Any) -> None:
    """The look of every panel."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#e5e7eb", linewidth=0.7)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=8, length=3)


def step_axis(axis: Any, curves: Curves) -> None:
    """The horizontal axis, as long as the longer of the runs."""
    from matplotlib.ticker import MaxNLocator

    end = max(curves.last, 1)
    axis.set_xlim(-0.02 * end, 1.02 * end)
    axis.set_xlabel("step", fontsize=8)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))


def draw_line(
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


def draw_beside(axis: Any, curves: Curves, metric: str, what: str = "", style: str = "-") -> None:
    """The compared run's curve, in the colour that no curve of the run itself has."""
    other = curves.beside
    if other is not None and metric in other:
        draw_line(axis, other[metric], BESIDE, f"{other.name}, {what}" if what else other.name, style, faint=0)


def draw_legend(axis: Any, columns: int = 1) -> None:
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

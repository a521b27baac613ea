"""Curves: drawn for every kind of run, from whatever there is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asd_megatron.errors import UserError
from asd_megatron.observe.curves import Curves, smooth
from asd_megatron.observe.drawing import new_figure, spread_out
from asd_megatron.observe.plots import _choose, draw_panels, plot_run
from asd_megatron.observe.run_names import run_names
from asd_megatron.observe.writer import RunWriter, read_metrics
from tools import plot_run as plot_tool

NAN = float("nan")


def write_run(folder: Path, steps: int, **extra: float) -> Path:
    with RunWriter(folder, tensorboard=False) as writer:
        writer.write(0, {"evaluation/accuracy": 0.2, "evaluation/length_mean": 9.0})
        for step in range(1, steps + 1):
            warm = step <= 2
            metrics = {
                "reward/mean": step / steps,
                "reward/pass_rate": step / steps,
                "response/length_mean": 10.0 + step,
                "entropy/student_mean": 0.5,
                "entropy/student_median": 0.2,
                "pmi/mean": -0.1 if step % 2 else NAN,
                "pmi/q05": -1.0,
                "pmi/q50": 0.0,
                "pmi/q95": 1.0,
                "gate/lambda": 0.0 if warm else 0.5,
                "gate/entropy": 0.3,
                "gate/h_warm": NAN if warm else 0.3,
                "gate/close_below": NAN if warm else 0.279,
            }
            writer.write(step, {**metrics, **extra})
    return folder


def titles(folder: Path) -> list[str]:
    return [panel.title for panel in _choose(Curves(read_metrics(folder)))]


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def test_training_run(tmp_path: Path) -> None:
    classes = {f"puzzle/u_class_{i}": float(i) for i in range(9)}
    path = plot_run(write_run(tmp_path, 60, **classes))
    assert path == tmp_path / "curves.png"
    width, height = png_size(path)
    assert width > 1500 and height > 700
    assert titles(tmp_path) == [
        "Accuracy",
        "Response length (tokens)",
        "Entropy of the next token (nats)",
        "PMI u by token class, mean (nats)",
        "Gate",
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]


def gate_axis(folder: Path) -> Any:
    curves = Curves(read_metrics(folder))
    axis = new_figure(4, 3).subplots()
    panel = next(panel for panel in _choose(curves) if panel.title == "Gate")
    panel.draw(axis, curves)
    return axis.child_axes[1]


@pytest.mark.parametrize("h_warm", [0.3, 0.001])
def test_the_gates_thresholds_are_visible_and_named(tmp_path: Path, h_warm: float) -> None:
    write_run(tmp_path, 5, **{"gate/h_warm": h_warm, "gate/close_below": 0.93 * h_warm, "gate/entropy": 0.35})
    axis = gate_axis(tmp_path)
    low, high = axis.transAxes.inverted().transform(axis.transData.transform([(1, 0.93 * h_warm), (1, h_warm)]))[:, 1]
    assert 0.02 < low < high < 1  # inside the panel, above its bottom
    assert f"closes below {0.93 * h_warm:.3g}" in axis.get_legend_handles_labels()[1]


def labels(axis: Any) -> list[str]:
    return [text for part in (axis, *axis.child_axes) for text in part.get_legend_handles_labels()[1]]


def test_lambdas_from_the_perplexity_have_a_panel_instead(tmp_path: Path) -> None:
    lambdas = {"lambda/mean": 0.1, "lambda/min": -0.02, "lambda/max": 0.4, "gate/lambda": NAN, "gate/entropy": NAN}
    png_size(plot_run(write_run(tmp_path, 20, **lambdas)))
    assert titles(tmp_path)[-1] == "Lambda of the responses" and "Gate" not in titles(tmp_path)


METHODS = {
    "lambda/mean": 0.1,
    "lambda/min": -0.02,
    "lambda/max": 0.4,
    "perplexity/mean": 1.5,
    "perplexity/median": 1.4,
    "perplexity/target": NAN,
    "divergence/mean": 0.1,
    "divergence/reverse_kl": 1.2,
    "divergence/forward_kl": 1.9,
    "kl/k1": -0.01,
    "kl/k2": 0.02,
    "kl/k3": 0.01,
}
"""What the teacher's perplexity, the exact divergence and the KL penalty add."""


def test_each_part_of_the_method_has_a_panel(tmp_path: Path) -> None:
    write_run(tmp_path, 5, **METHODS)
    curves = Curves(read_metrics(tmp_path))
    drawn = dict(zip(titles(tmp_path), draw_panels(curves, _choose(curves)).axes, strict=True))
    assert labels(drawn["Divergence of student and teacher (nats)"]) == ["D", "reverse KL", "forward KL"]
    assert drawn["KL to the initial weights, k3 (nats)"].get_lines()
    assert labels(drawn["Teacher's perplexity of a response"]) == ["mean", "median"]  # no target yet


def test_another_run_is_drawn_beside_in_every_panel(tmp_path: Path) -> None:
    extra = {"puzzle/u_other": 1.0, "reward/mean": 0.5, **METHODS}
    folders = [write_run(tmp_path / name, 5, **extra) for name in "ab"]
    names = ["antisd-of-the-first-study-1", "grpo"]
    own = Curves(read_metrics(folders[0]), names[0], Curves(read_metrics(folders[1]), names[1]))
    panels = _choose(own)
    shown = {panel.title for panel in panels}
    assert {"Mean reward", "Pass rate", "Gate", "Lambda of the responses"} <= shown
    assert "PMI u = teacher - student log-prob (nats)" in shown
    figure = draw_panels(own, panels)
    figure.draw_without_rendering()
    assert len(figure.axes) == len(panels)  # no empty panel
    for axis, panel in zip(figure.axes, panels, strict=True):
        low, high = axis.get_ylim()
        assert panel.title != "PMI u = teacher - student log-prob (nats)" or high < 0.2, (low, high)
        if not panel.title.startswith("PMI u by token class"):
            assert all(any(text.startswith(name) for text in labels(axis)) for name in names), panel.title
    legends = [part.get_legend() for axis in figure.axes for part in (axis, *axis.child_axes) if part.get_legend()]
    assert len(legends) == 10 and fit(legends)


def fit(legends: list[Any]) -> bool:
    """Whether every legend lies inside its panel, by its width and height."""
    boxes = [(legend.get_window_extent(), legend.axes.get_window_extent()) for legend in legends]
    return all(own.width <= panel.width and own.height <= panel.height for own, panel in boxes)


def test_the_gates_legend_fits_its_panel(tmp_path: Path) -> None:
    write_run(tmp_path, 5, **{"gate/h_warm": 0.00123, "gate/close_below": 0.00114})
    axis = gate_axis(tmp_path)
    assert fit([axis.get_legend()]) and "opens from 0.00123" in labels(axis)


@pytest.mark.parametrize(
    ("recipes", "paths", "names"),
    [
        (["antisd-1", "grpo-1"], ["a/run", "b/run"], ["antisd-1", "grpo-1"]),
        (["run", "grpo-1"], ["a/run", "b/run"], ["a", "b"]),
        (["same", "same"], ["antisd/x/run", "grpo/x/run"], ["antisd", "grpo"]),
        ([None, None], ["one", "two"], ["one", "two"]),
        ([None, None], ["one", "one"], ["one (1)", "one (2)"]),
        (["run"], ["a/run"], ["a"]),
    ],
)
def test_names_that_tell_runs_apart(
    tmp_path: Path, recipes: list[str | None], paths: list[str], names: list[str]
) -> None:
    for recipe, path in zip(recipes, paths, strict=True):
        (tmp_path / path).mkdir(parents=True, exist_ok=True)
        if recipe:
            (tmp_path / path / "recipe.yaml").write_text(f"run: {{name: {recipe}}}\n")
    assert run_names(*(tmp_path / path for path in paths)) == names


def test_graded_rewards_have_a_panel_of_their_own(tmp_path: Path) -> None:
    run = write_run(tmp_path, 5, **{"reward/pass_rate": 0.0, "evaluation/accuracy": 0.5, "evaluation/pass_rate": 0.25})
    assert titles(run)[:2] == ["Mean reward", "Pass rate"] and "Accuracy" not in titles(run)
    curves = Curves(read_metrics(run))
    for panel, last in zip(_choose(curves), (0.5, 0.25), strict=False):
        axis = new_figure(4, 3).subplots()
        panel.draw(axis, curves)
        held_out = next(line for line in axis.get_lines() if line.get_label() == "held-out")
        assert held_out.get_ydata()[-1] == last


@pytest.mark.parametrize("steps", [1, 3])
def test_short_runs(tmp_path: Path, steps: int) -> None:
    png_size(plot_run(write_run(tmp_path, steps)))
    assert "PMI u = teacher - student log-prob (nats)" in titles(tmp_path)


def test_runs_with_less_to_show(tmp_path: Path) -> None:
    with RunWriter(tmp_path / "grpo", tensorboard=False) as writer:
        writer.write(1, {"reward/mean": 0.5, "entropy/student_mean": 0.3, "entropy/student_median": NAN})
    assert titles(tmp_path / "grpo") == ["Mean reward", "Entropy of the next token (nats)"]
    plot_run(tmp_path / "grpo")
    with RunWriter(tmp_path / "sft", tensorboard=False) as writer:
        for step in range(1, 4):
            writer.write(step, {"sft/loss": 1.0 / step, "optimizer/grad_norm": 1.0, "tokens/per_second": 10.0})
    assert titles(tmp_path / "sft") == ["Cross-entropy (nats)", "Gradient norm", "Tokens / s"]
    plot_run(tmp_path / "sft")


def test_a_run_without_any_context_has_panels_without_curves(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    nothing = {"gate/entropy": NAN, "gate/h_warm": NAN, "gate/close_below": NAN, "perplexity/target": NAN}
    plot_run(write_run(tmp_path, 3, **nothing))
    assert not [str(warning.message) for warning in recwarn if "legend" in str(warning.message)]


def test_nothing_to_plot(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        plot_run(tmp_path)
    with RunWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, {"reward/mean": NAN})
    with pytest.raises(UserError, match="holds nothing to plot yet"):
        plot_run(tmp_path)


def test_tool(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run", 3)
    target = tmp_path / "picture.png"
    assert plot_tool.main([str(tmp_path / "run"), "--beside", str(tmp_path / "run"), "--output", str(target)]) == 0
    assert capsys.readouterr().out.strip() == str(target)
    png_size(target)
    assert plot_tool.main([str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_smoothing_keeps_lines_and_constants() -> None:
    assert smooth(np.full(7, 3.0), 5).tolist() == [3.0] * 7
    assert smooth(np.arange(5.0), 3).tolist() == [0.5, 1.0, 2.0, 3.0, 3.5]
    assert smooth(np.array([4.0]), 1).tolist() == [4.0]


@given(st.lists(st.floats(-10, 10), max_size=9))
def test_labels_are_spread_out(values: list[float]) -> None:
    ordered = sorted(values)
    places = spread_out(ordered, 1.0)
    assert all(b - a >= 1.0 - 1e-9 for a, b in zip(places, places[1:], strict=False))
    if all(b - a >= 1.0 for a, b in zip(ordered, ordered[1:], strict=False)):
        assert places == pytest.approx(ordered)
    if places:
        assert sum(places) == pytest.approx(sum(ordered), abs=1e-6)

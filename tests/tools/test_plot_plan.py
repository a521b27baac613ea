"""tools/plot_plan.py on two sizes of one model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import plot_plan


def test_a_curve_is_drawn_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    png, rows = tmp_path / "scale.png", tmp_path / "scale.json"
    plot_plan.main(
        [
            "--models",
            "Qwen3-4B-Instruct-2507",
            "--gpus",
            "2",
            "8",
            "--gpu",
            "h200",
            "--png",
            str(png),
            "--json",
            str(rows),
        ]
    )
    small, large = json.loads(rows.read_text())
    assert png.stat().st_size > 10_000
    assert small["efficiency"] == 1.0
    assert small["seconds"] > large["seconds"]
    assert large["efficiency"] == pytest.approx(small["seconds"] * 2 / (large["seconds"] * 8))
    assert capsys.readouterr().out.count("| Qwen3-4B-Instruct-2507 |") == 2

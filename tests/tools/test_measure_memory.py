"""tools/measure_memory.py: the peak of real updates is what the planner predicts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "measure_memory.py"


@pytest.mark.parametrize(
    ("cell", "sequences", "ranks"),
    [
        ("Qwen3, 1 rank, float32, none", 1, 1),
        pytest.param("Qwen3, 1 rank, bfloat16, none", 1, 1, marks=pytest.mark.slow),
        pytest.param("Olmo 3, TP 2, SP, float32, none", 2, 2, marks=pytest.mark.slow),
        pytest.param("Qwen3-MoE, EP 2, bfloat16, none", 2, 2, marks=pytest.mark.slow),
    ],
)
def test_an_update_needs_what_was_predicted(tmp_path: Path, cell: str, sequences: int, ranks: int) -> None:
    report = tmp_path / "report.json"
    options = ("--only", f"^{cell}$", "--sequences", str(sequences), "--json", str(report))
    done = subprocess.run(
        [sys.executable, str(TOOL), *options], env={**os.environ}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(report.read_text())["rows"]
    assert len(rows) == ranks
    for row in rows:
        assert abs(row["error"]) < 0.15, row

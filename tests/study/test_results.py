"""What is read from a finished cell's metrics."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from asd_megatron.errors import UserError
from asd_megatron.study.plan import CellKey
from asd_megatron.study.results import finished, points, read_result, training_seconds, write_results
from tests.study.world import record, result

KEY = CellKey("a", "s", 1)
ROWS = [
    {"step": 0, "evaluation/accuracy": 0.2},
    {"step": 1, "time/total": 2.0, "pmi/mean": 1.0, "gate/h_warm": None},
    {
        "step": 2,
        "time/total": 5.0,
        "time/evaluate": 2.5,
        "pmi/mean": 3.0,
        "gate/h_warm": 0.5,
        "evaluation/accuracy": 0.4,
    },
    {"step": 3, "time/total": 2.0, "puzzle/u_so": -1.0},
    {"step": 4, "time/total": None, "pmi/mean": 5.0},
]


def test_training_seconds_leave_evaluations_out() -> None:
    assert training_seconds(ROWS) == [0.0, 2.0, 4.5, 6.5, 6.5]


def test_points_are_the_evaluations_and_the_end() -> None:
    start, middle, end = points(ROWS)
    assert (start.step, start.seconds, start.metrics, start.missing) == (0, 0.0, {"evaluation/accuracy": 0.2}, {})
    assert (middle.step, middle.seconds) == (2, 4.5)
    assert middle.metrics["evaluation/accuracy"] == 0.4 and middle.metrics["pmi/mean"] == 2.0
    assert middle.metrics["gate/h_warm"] == 0.5 and middle.missing["gate/h_warm"] == 1
    assert (end.step, end.metrics["pmi/mean"], end.metrics["puzzle/u_so"]) == (4, 5.0, -1.0)
    assert end.missing["pmi/mean"] == 1 and "evaluation/accuracy" not in end.metrics


def test_looking_up_a_step() -> None:
    cell = result(KEY, [0.2, 0.4])
    assert (cell.at(10, "evaluation/accuracy"), cell.seconds_at(10)) == (0.4, 20.0)
    assert cell.at(5, "evaluation/accuracy") is None and cell.at(10, "nothing") is None and cell.seconds_at(5) is None


def test_only_finished_cells_count(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    states = [record(KEY), record(KEY, status="failed"), record(KEY, status="running"), None]
    assert len(finished((KEY, tmp_path, state) for state in states)) == 1
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="empty though cell a/s/seed_1 is finished"):
        read_result(KEY, tmp_path)


def test_results_file(tmp_path: Path) -> None:
    path = write_results(tmp_path, [result(KEY, [0.2, 0.4])])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["arm"], row["start"], row["seed"], row["step"]) for row in lines] == [
        ("a", "s", 1, 0),
        ("a", "s", 1, 10),
    ]
    assert (
        lines[1]["seconds"] == 20.0 and lines[1]["evaluation/accuracy"] == 0.4 and lines[1]["missing"]["pmi/mean"] == 5
    )

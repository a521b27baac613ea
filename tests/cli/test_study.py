"""`asd-megatron study`: listing, running, continuing, reporting; and once with real runs."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from asd_megatron.cli import study as verb
from asd_megatron.cli.main import main
from asd_megatron.study.cells import CELL_FILE
from asd_megatron.study.runner import Runner
from tests.study.world import FAILS, pretend, write_study

ROOT = Path(__file__).parents[2]
ARMS: dict[str, Any] = {"grpo": {"overrides": {"algorithm.name": "grpo"}}, "antisd": {}}
BAD: dict[str, Any] = ARMS | {"bad": {"overrides": dict(FAILS)}}


@pytest.fixture(autouse=True)
def only_pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verb, "Runner", functools.partial(Runner, command=pretend))


def study(folder: Path, *arguments: str, **changed: Any) -> int:
    return main(["study", str(write_study(folder, **{"target": {"at_least": 0.3}, **changed})), *arguments])


def test_a_study_from_start_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "studies" / "small"
    assert study(tmp_path, "--dry-run", seeds=[1, 2]) == 0
    said = capsys.readouterr().out
    assert f"in {folder}," in said and "antisd/default/seed_2" in said and "2 steps  waiting" in said
    assert said.endswith("4 cells: 4 waiting\n") and not folder.exists()
    assert study(tmp_path, seeds=[1, 2]) == 0
    said = capsys.readouterr()
    assert "report.md: 4 of 4 cells" in said.out and "4 of 4 cells to run, 1 at a time" in said.err
    assert "+0.000" in (folder / "report.md").read_text()
    assert len((folder / "results.jsonl").read_text().splitlines()) == 12  # 4 cells, 3 evaluations
    assert (folder / "plots" / "evaluation_accuracy.png").is_file() and (folder / "study.yaml").is_file()
    assert study(tmp_path, "--parallel", "2", seeds=[1, 2, 3]) == 0
    assert "2 of 6 cells to run, 2 at a time" in capsys.readouterr().err  # finished cells are skipped
    assert study(tmp_path, "--dry-run", seeds=[1, 2, 3]) == 0
    assert capsys.readouterr().out.endswith("6 cells: 6 finished\n")


def test_failed_cells_are_told_and_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert study(tmp_path, arms=BAD) == 1
    assert "failed: bad/default/seed_1" in capsys.readouterr().out
    assert study(tmp_path, "--report", arms=BAD) == 1
    assert "the corpus is empty" in (tmp_path / "studies/small/report.md").read_text()
    assert study(tmp_path, arms=BAD) == 1
    assert "1 of 3 cells to run" in capsys.readouterr().err


def test_some_arms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert study(tmp_path, "--only", "antisd", arms=BAD) == 0
    assert "report.md: 1 of 3 cells" in capsys.readouterr().out
    assert study(tmp_path, "--only", "antisd,grp", arms=BAD) == 2
    assert "no arm 'grp': did you mean 'grpo'?" in capsys.readouterr().err


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert study(tmp_path) == 0
    assert study(tmp_path, overrides={"run.steps": 3}) == 2
    assert "run with another recipe (run.steps: 2 -> 3)" in capsys.readouterr().err
    assert study(tmp_path, "--parallel", "0") == 2
    assert study(tmp_path, "--dry-run", starts={"far": {"model.path": "nowhere"}}, name="far") == 0
    assert "nowhere is no model folder" in capsys.readouterr().out
    assert study(tmp_path, starts={"far": {"model.path": "nowhere"}}) == 2
    assert "model.path of cell grpo/far/seed_1: nowhere is no model folder" in capsys.readouterr().err


def test_an_interrupted_study_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert study(tmp_path) == 0
    path = tmp_path / "studies/small/cells/antisd/default/seed_1" / CELL_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"status": "running"}))  # as a killed study leaves it
    assert study(tmp_path, "--report") == 0
    assert "1 of 2 cells finished, 1 running" in (tmp_path / "studies/small/report.md").read_text()
    assert study(tmp_path) == 0
    assert "1 of 2 cells to run" in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["study", "--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0 and "--dry-run" in said and "report.md" in said and "docs/studies.md" in said


def test_real_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(verb, "Runner", Runner)  # no pretending
    monkeypatch.chdir(ROOT)
    overrides = {
        "run.steps": 2,
        "parallelism.tensor": 1,
        "evaluation.every": 1,
        "evaluation.problems": 8,
        "checkpoint.export_at_end": False,
        "logging.tensorboard": False,
    }
    changed = {"recipe": "examples/puzzle/quickstart.yaml", "overrides": overrides, "parallel": 2, "timeout": 240.0}
    status = study(tmp_path, arms=ARMS, plot=["evaluation/accuracy", "reward/mean"], **changed)
    folder = tmp_path / "studies" / "small"
    logs = {path.parts[-4]: path.read_text() for path in folder.glob("cells/*/*/*/log.txt")}
    assert status == 0, logs
    assert "report.md: 2 of 2 cells" in capsys.readouterr().out
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert [(row["arm"], row["step"]) for row in rows] == [
        (arm, step) for arm in ("grpo", "antisd") for step in (0, 1, 2)
    ]
    before = {row["evaluation/accuracy"] for row in rows if row["step"] == 0}
    assert len(before) == 1  # the same start and seed
    assert all(row["seconds"] > 0 and row["entropy/student_mean"] > 0 for row in rows if row["step"])
    assert [path.stem for path in sorted((folder / "plots").iterdir())][:2] == [
        "evaluation_accuracy",
        "overview_by_seconds",
    ]

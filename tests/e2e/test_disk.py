"""A disk that is full for a while, read-only, or gone, under a run."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from asd_megatron import train
from asd_megatron.observe.lines import LineFile
from asd_megatron.observe.writer import read_metrics
from asd_megatron.run.history import read_history
from asd_megatron.run.rl import TrainingRun
from tests.e2e.world import World, call, metrics, refusal, steps

ROOM = 40 << 10  # bytes: for recipe and history, for about three lines of metrics, for no checkpoint


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], check=False)
    if mounted.returncode:
        pytest.skip("only root may mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _before_the_save(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], Any]) -> None:
    """Call `action` after `step`, once its metrics are on their way and before its checkpoint."""
    save = TrainingRun.checkpoint_if_due

    def due(run: TrainingRun, current: int) -> None:
        run.reports.finish()
        if current == step:
            action()
        save(run, current)

    monkeypatch.setattr(TrainingRun, "checkpoint_if_due", due)


@pytest.mark.parametrize("async_save", [False, True])
def test_a_disk_that_is_full_for_a_while_loses_nothing(
    world: World, disk: Path, async_save: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (disk / "ballast").write_bytes(bytes((2 << 20) - ROOM))
    options: dict[str, dict[str, Any]] = {
        "run": {"steps": 7, "dump_rollouts": True},
        "checkpoint": {"every": 1, "async_save": async_save},
        "logging": {"tensorboard": True},
    }
    straight = world.train("straight_disk", **{**options, "logging": {}})
    _before_the_save(monkeypatch, 5, (disk / "ballast").unlink)
    options["run"]["folder"] = str(disk / "run")
    capsys.readouterr()
    world.train("full", **options)
    errors, folder = capsys.readouterr().err, disk / "run"

    kept = [{k: v for k, v in row.items() if not k.startswith(("files/", "checkpoint/"))} for row in metrics(folder)]
    assert kept == metrics(straight)  # every line, and the state was never touched
    rows = read_metrics(folder)
    assert sum(row.get("checkpoint/failed", 0) for row in rows) == 4
    assert max(row.get("files/waiting_lines", 0) for row in rows) >= 1 and "files/waiting_lines" not in rows[-1]
    assert rows[3]["files/dumps_dropped"] == rows[-1]["files/tensorboard_dropped"] == 1
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"latest", "step_000006", "step_000007"}
    failed = [event for event in read_history(folder) if event["event"] == "save_failed"]
    assert all(event["newest"] is None and event["reason"] for event in failed)  # those that there was room for
    assert "Traceback" not in errors and errors.count("TensorBoard's files") == 1
    assert "lines wait in memory for room" in errors
    assert "the checkpoint of step 1 cannot be saved in" in errors and "next step tries again" in errors
    assert "of step 5 is written, after 4 failed attempts" in errors


def test_a_run_that_could_not_save_its_last_step_continues_later(
    world: World, disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (disk / "ballast").write_bytes(bytes((2 << 20) - (400 << 10)))  # room for one checkpoint, not for two
    arguments = [str(world.recipe(run={"folder": str(disk / "run"), "steps": 3}, checkpoint={"every": 1}))]
    message = refusal(capsys, train.main, arguments)
    assert "step 3 cannot be saved in" in message and "step_000001: start the same command again" in message
    assert not (disk / "run" / "summary.json").exists()
    (disk / "ballast").unlink()
    assert call(train.main, arguments) == 0
    assert steps(disk / "run") == [1, 2, 3]


@pytest.mark.parametrize("what", ["read-only", "gone"])
def test_a_run_folder_that_is_lost_ends_the_run_with_a_line(
    world: World, disk: Path, what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def read_only(file: LineFile) -> None:  # a file system with open files cannot be made so
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(file.path))

    def lose() -> None:
        if what == "gone":
            shutil.rmtree(disk / "run")
        else:
            monkeypatch.setattr(LineFile, "write_waiting", read_only)

    _before_the_save(monkeypatch, 2, lose)
    keys = {"folder": str(disk / "run"), "steps": 5, "dump_rollouts": True}
    recipe = world.recipe(run=keys, checkpoint={"every": 1}, logging={"tensorboard": True})
    message = refusal(capsys, train.main, [str(recipe)])
    assert "cannot be written" in message
    assert (disk / "run").exists() == (what == "read-only")  # it is not made again

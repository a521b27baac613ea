"""Running cells: failures, interruptions, limits; with processes that only pretend to train."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from asd_megatron.errors import UserError
from asd_megatron.observe.progress import clock_text
from asd_megatron.study.cells import read_record
from asd_megatron.study.plan import Cell, plan_cells
from asd_megatron.study.progress import StudyProgress, seconds_left
from asd_megatron.study.runner import Runner, locked, threads_per_rank, train_command
from asd_megatron.study.schema import make_study
from tests.study.world import FAILS, SLEEPS, STOPS, pretend, study_values


def cells_of(folder: Path, arms: dict[str, Any]) -> list[Cell]:
    return plan_cells(make_study(study_values(folder, arms={n: {"overrides": dict(o)} for n, o in arms.items()})))


def runner(cells: list[Cell], stream: io.StringIO | None = None, **changed: Any) -> Runner:
    parallel = changed.pop("parallel", 1)
    progress = StudyProgress(len(cells), parallel=parallel, stream=stream or io.StringIO())
    return Runner(parallel=parallel, **{"timeout": 60.0, "progress": progress, "command": pretend, **changed})


def wait_for(path: Path) -> None:
    for _ in range(600):
        if path.exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} did not appear")


def test_a_failed_cell_does_not_stop_the_others(tmp_path: Path) -> None:
    cells, stream = cells_of(tmp_path, {"bad": FAILS, "good": {}}), io.StringIO()
    assert list(runner(cells, stream).run(cells).values()) == ["failed", "finished"]
    bad, good = (read_record(cell.folder) for cell in cells)
    assert bad is not None and good is not None
    assert (bad.status, bad.exit_status, bad.log_tail[-1]) == ("failed", 3, "ValueError: the corpus is empty")
    assert (good.status, good.exit_status, list(good.log_tail)) == ("finished", 0, [])
    assert good.seconds and good.cpu_seconds and good.ended and good.recipe["run"]["seed"] == 1
    assert good.command[:2] == ["asd-megatron", "train"]
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("cell 1/2 [") and "bad/default/seed_1 failed" in lines[0]
    assert lines[1].startswith("cell 2/2 [") and lines[1].endswith("0 running")


def test_a_run_that_was_asked_to_stop_is_not_finished(tmp_path: Path) -> None:
    cells = cells_of(tmp_path, {"stopped": STOPS, "good": {}})
    assert list(runner(cells).run(cells).values()) == ["interrupted", "finished"]
    stopped = read_record(cells[0].folder)
    assert stopped is not None and (stopped.status, stopped.exit_status) == ("interrupted", 0)


def test_cores_are_divided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    assert [threads_per_rank(*ask) for ask in ((1, 1), (2, 1), (2, 2), (8, 4))] == [8, 4, 2, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads_per_rank(2, 1) == 3
    cells = cells_of(tmp_path, {"a": {}})
    runner(cells).run(cells)
    assert (cells[0].folder / "log.txt").read_text() == "threads 3\n"


def test_a_cell_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    cells = cells_of(tmp_path, {"slow": SLEEPS, "good": {}})
    assert list(runner(cells, timeout=1.0).run(cells).values()) == ["failed", "finished"]
    slow = read_record(cells[0].folder)
    assert slow is not None and slow.log_tail[-1] == "ended by the study after 1 s (timeout)"
    assert slow.exit_status == -15


def test_an_interruption_ends_the_children_and_keeps_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = cells_of(tmp_path, {"good": {}, "slow": SLEEPS, "never": {}})
    program = runner(cells)
    asleep, slept = cells[1].run_folder / "asleep", time.sleep
    pids: list[int] = []

    def interrupt(seconds: float) -> None:
        if asleep.exists() and not pids:
            pids.extend(running.process.pid for running in program._running)
            raise KeyboardInterrupt
        slept(seconds)

    monkeypatch.setattr("asd_megatron.study.runner.time.sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        program.run(cells)
    states = [record.status if (record := read_record(cell.folder)) else None for cell in cells]
    assert states == ["finished", "interrupted", None] and len(pids) == 1
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


def test_so_many_at_a_time(tmp_path: Path) -> None:
    cells = cells_of(tmp_path, {"a": SLEEPS, "b": SLEEPS, "c": {}})
    program = runner(cells, parallel=2, timeout=3.0)
    thread = threading.Thread(target=program.run, args=(cells,))
    thread.start()
    for cell in cells[:2]:
        wait_for(cell.run_folder / "asleep")  # both at once
    assert not cells[2].folder.exists()
    thread.join(60)
    assert [r.status for c in cells if (r := read_record(c.folder))] == ["failed", "failed", "finished"]


def test_a_folder_is_held_by_one_study_and_by_the_cells_it_left_behind(tmp_path: Path) -> None:
    with locked(tmp_path) as lock:
        orphan = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(lock,))
        with pytest.raises(UserError, match=f"in use by another .*process {os.getpid()}"), locked(tmp_path):
            pass
    with pytest.raises(UserError, match="in use by another"), locked(tmp_path):
        pass
    orphan.communicate(b"\n", timeout=60)
    with locked(tmp_path):
        pass


def test_the_command_is_that_of_an_ordinary_run(tmp_path: Path) -> None:
    (cell,) = cells_of(tmp_path, {"a": {}})
    assert train_command(cell)[1:4] == ["-m", "asd_megatron.cli.main", "train"]
    assert train_command(cell)[4:] == cell.arguments


def test_times() -> None:
    assert [clock_text(seconds) for seconds in (7.4, 307, 3729)] == ["00:07", "05:07", "1:02:09"]
    assert seconds_left([], 4, 2) is None
    assert seconds_left([10.0, 20.0], 4, 2) == 30.0

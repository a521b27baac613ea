"""Runs the cells of a study as processes of their own, some at a time."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from asd_megatron import __version__, locks
from asd_megatron.files import utc_now
from asd_megatron.study.cells import LOG_FILE, CellRecord, Status, log_tail, write_record
from asd_megatron.study.plan import Cell
from asd_megatron.study.progress import StudyProgress

LOCK_FILE = ".lock"
POLL = 0.2  # seconds between looks at the children
STOP_WAIT = 30.0  # seconds for a child to end after SIGTERM; the launcher of several ranks ends them first


def train_command(cell: Cell) -> list[str]:
    """`asd-megatron train RECIPE --overrides` by this interpreter."""
    return [sys.executable, "-m", "asd_megatron.cli.main", "train", *cell.arguments]


def threads_per_rank(parallel: int, ranks: int) -> int:
    """The cores divided among the cells that run at once and their ranks, at least 1; OMP_NUM_THREADS wins."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdigit():
        return int(given)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // (parallel * ranks))


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Hold the study's folder; yields the file descriptor that children inherit, so that the cells of a study that was
    killed hold it too. Raises UserError if somebody else does."""
    folder.mkdir(parents=True, exist_ok=True)

    def refusal(holder: str) -> str:
        return (
            f"{folder} is in use by another `asd-megatron study`, or by a cell that one left behind when it was "
            f"killed ({holder}): wait for it, or end it"
        )

    with locks.locked(folder / LOCK_FILE, refusal) as handle:
        yield handle


@dataclass
class _Running:
    cell: Cell
    record: CellRecord
    process: subprocess.Popen[bytes]
    begun: float
    cpu_seconds: float | None = None

    def poll(self) -> int | None:
        """The exit status (-n after signal n) once the process has ended; then its CPU time too."""
        if self.process.returncode is None:
            pid, status, usage = os.wait4(self.process.pid, os.WNOHANG)  # instead of Popen.poll: it tells the CPU time
            if pid:
                self.process.returncode = os.waitstatus_to_exitcode(status)
                self.cpu_seconds = round(usage.ru_utime + usage.ru_stime, 3)
        return self.process.returncode

    def seconds(self) -> float:
        return time.monotonic() - self.begun


class Runner:
    """`run` runs cells `parallel` at a time. A failed cell is recorded and does not stop the others; on
    KeyboardInterrupt the children are ended and their cells recorded as interrupted. `command` says how to run one."""

    def __init__(
        self,
        *,
        parallel: int,
        timeout: float,
        progress: StudyProgress,
        lock: int | None = None,
        command: Callable[[Cell], list[str]] = train_command,
    ) -> None:
        self.parallel, self.timeout, self.progress = parallel, timeout, progress
        self.command = command
        self._kept_open = () if lock is None else (lock,)
        self._running: list[_Running] = []

    def run(self, cells: Sequence[Cell]) -> dict[Cell, Status]:
        """What became of each cell."""
        waiting, statuses = list(cells), {}
        try:
            while waiting or self._running:
                while waiting and len(self._running) < self.parallel:
                    self._start(waiting.pop(0))
                for running in list(self._running):
                    status = self._ended(running)
                    if status is not None:
                        self._running.remove(running)
                        statuses[running.cell] = status
                time.sleep(POLL if self._running else 0)
        finally:
            self._stop()
        return statuses

    def _start(self, cell: Cell) -> None:
        command = self.command(cell)
        threads = threads_per_rank(self.parallel, cell.recipe.parallelism.ranks)
        record = CellRecord(
            arm=cell.key.arm,
            start=cell.key.start,
            seed=cell.key.seed,
            status="running",
            recipe_hash=cell.hash,
            overrides=cell.overrides,
            recipe=cell.recipe.model_dump(mode="json"),
            command=["asd-megatron", "train", *cell.arguments],
            version=__version__,
            threads=threads,
            parallel=self.parallel,
            started=utc_now(),
        )
        if not (cell.run_folder / "recipe.yaml").is_file():  # else the run itself resumes or overwrites
            shutil.rmtree(cell.run_folder, ignore_errors=True)
        write_record(cell.folder, record)
        with (cell.folder / LOG_FILE).open("wb") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": str(threads)},
                start_new_session=True,  # a process group of its own, to end all of it; Ctrl-C reaches us alone
                pass_fds=self._kept_open,
            )
        self._running.append(_Running(cell, record, process, time.monotonic()))
        self.progress.started(str(cell.key))

    def _ended(self, running: _Running) -> Status | None:
        """Record a child that has ended, or that has run for too long; None while it runs."""
        code = running.poll()
        late = code is None and running.seconds() > self.timeout
        if code is None and not late:
            return None
        if late:
            _end([running.process])
        status: Status = "failed" if code != 0 else "interrupted" if _was_stopped(running.cell) else "finished"
        tail = () if code == 0 else log_tail(running.cell.folder)
        if late:
            tail = (*tail, f"ended by the study after {self.timeout:g} s (timeout)")
        self._write(running, status, tail)
        self.progress.ended(str(running.cell.key), status, running.seconds())
        return status

    def _stop(self) -> None:
        """End the children that still run: only after an interruption or an error of ours."""
        if not self._running:
            return
        _end([running.process for running in self._running])
        for running in self._running:
            self._write(running, "interrupted")
        self._running.clear()

    def _write(self, running: _Running, status: Status, tail: tuple[str, ...] = ()) -> None:
        record = replace(
            running.record,
            status=status,
            ended=utc_now(),
            seconds=round(running.seconds(), 3),
            cpu_seconds=running.cpu_seconds,
            exit_status=running.process.returncode,
            log_tail=tail,
        )
        write_record(running.cell.folder, record)


def _was_stopped(cell: Cell) -> bool:
    """Whether the cell's run has ended before its last step because it was asked to (a signal, its time limit)."""
    history = cell.run_folder / "history.jsonl"
    return history.is_file() and '"event": "stop"' in history.read_text(encoding="utf-8").splitlines()[-1]


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """SIGTERM to the process groups of our children, SIGKILL to those that do not end in time."""
    for process in processes:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_WAIT
    for process in processes:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except (subprocess.TimeoutExpired, KeyboardInterrupt):  # a second Ctrl-C does not wait
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(STOP_WAIT)

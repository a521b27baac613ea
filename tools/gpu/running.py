"""Running rows one after another, bounded in time, and the table of their results."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from xml.etree.ElementTree import ParseError

from gpu import figures
from gpu.machine import ROOT, Machine, environment
from gpu.rows import REPORT, Row

Result = Literal["ok", "FAILED", "not runnable", "not run"]
STOPPING = ((signal.SIGINT, 45.0), (signal.SIGTERM, 20.0), (signal.SIGKILL, 20.0))
"""How a row's processes are ended: tests end what they started on the first, torchrun has 30 s for its ranks."""
POLL_SECONDS = 0.1
PROGRESS_SECONDS = 30.0
TAIL_LINES = 25
VISIBLE = "CUDA_VISIBLE_DEVICES"
NO_TEST_SELECTED = 5  # pytest's exit status


@dataclass(frozen=True)
class Outcome:
    """The result of a row. reason: "" for ok. seconds: how long it ran; None if it did not."""

    row: Row
    result: Result
    reason: str = ""
    seconds: float | None = None
    values: dict[str, Any] = field(default_factory=dict)
    log: Path | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.row.name,
            "shows": self.row.shows,
            "needs": str(self.row.needs),
            "command": ["python", *self.row.command],
            "result": self.result,
            "reason": self.reason,
            "seconds": self.seconds,
            "figures": self.values,
            "log": None if self.log is None else str(self.log),
        }


class Interrupted(Exception):
    """The rows were interrupted. outcomes: of all of them."""

    def __init__(self, outcomes: list[Outcome]) -> None:
        super().__init__("interrupted")
        self.outcomes = outcomes


class Runner:
    """Runs rows on a machine. folder: of logs and reports. deadline: of `time.monotonic`, for all rows together."""

    def __init__(
        self, machine: Machine, folder: Path, say: Callable[[str], None], *, deadline: float = float("inf")
    ) -> None:
        self.machine, self.folder, self.say, self.deadline = machine, folder, say, deadline

    def run(self, rows: Sequence[Row], *, stop_at_failure: bool = False) -> list[Outcome]:
        """The outcomes of all rows, in their order. Raises Interrupted on Ctrl-C, with the running row ended."""
        outcomes: list[Outcome] = []
        for number, row in enumerate(rows):
            left = rows[number + 1 :]
            try:
                outcomes.append(self._one(row, f"[{number + 1}/{len(rows)}] {row.name}"))
            except KeyboardInterrupt:
                outcomes += [Outcome(row, "not run", "interrupted"), *_not_run(left, "interrupted")]
                raise Interrupted(outcomes) from None
            if stop_at_failure and outcomes[-1].result == "FAILED":
                return [*outcomes, *_not_run(left, f"{row.name} failed before")]
        return outcomes

    def _one(self, row: Row, title: str) -> Outcome:
        why = self.machine.missing(row.needs) or row.absent()
        if why is not None:
            return Outcome(row, "not runnable", why)
        seconds = min(row.seconds, self.deadline - time.monotonic())
        if seconds <= 0:
            return Outcome(row, "not run", "no time was left")
        self.say(f"{title}: {row.shows}")
        log, report = self.folder / f"{row.name}.log", self.folder / f"{row.name}.report"
        report.unlink(missing_ok=True)
        started = time.monotonic()
        status = self._execute(row, title, log, report, seconds)
        outcome = _judge(row, status, report, time.monotonic() - started, seconds, log)
        self.say(f"{title}: {_result(outcome)} after {outcome.seconds:.0f} s")
        if outcome.result == "FAILED":
            self.say(f"{tail(log)}\n{title}: the end of {log}")
        return outcome

    def _execute(self, row: Row, title: str, log: Path, report: Path, seconds: float) -> int | None:
        """The exit status; None for a row that had to be ended."""
        command = [sys.executable, *(part.replace(REPORT, str(report)) for part in row.command)]
        started, said = time.monotonic(), PROGRESS_SECONDS
        with log.open("w") as output, _process(command, output, _environment(row)) as process:
            while (passed := time.monotonic() - started) < seconds:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return process.wait(POLL_SECONDS)
                if passed > said:
                    said += PROGRESS_SECONDS
                    self.say(f"{title}: {passed:.0f} s, {log}")
        return None


def _environment(row: Row) -> dict[str, str]:
    """The row's own variables, and CUDA_VISIBLE_DEVICES with as many GPUs as it needs."""
    named = [name for name in os.environ.get(VISIBLE, "").split(",") if name]
    gpus = named or [str(index) for index in range(row.needs.gpus)]
    return {**row.environment, VISIBLE: ",".join(gpus[: row.needs.gpus])}


@contextlib.contextmanager
def _process(command: Sequence[str], output: Any, more: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group of its own, all of which has ended on leaving."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment() | more,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    for number, grace in STOPPING:
        if process.poll() is not None:
            break
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):  # a second Ctrl-C does not wait
            process.wait(grace)
    with contextlib.suppress(ProcessLookupError, PermissionError):  # what it left of its group
        os.killpg(process.pid, signal.SIGKILL)


def _judge(row: Row, status: int | None, report: Path, seconds: float, limit: float, log: Path) -> Outcome:
    found = figures.Figures()
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, ParseError):
        found = row.read(report)
    result: Result = "FAILED"
    if status is None:
        reason = f"it did not end within {limit:.0f} s"
    elif status == NO_TEST_SELECTED and row.tests:
        reason = "no test was selected"
    elif status:
        reason = f"exit status {status}"
    elif found.skipped is not None:
        result, reason = "not runnable", found.skipped
    elif not found.values:
        reason = "it wrote no figures"
    else:
        result, reason = "ok", ""
    return Outcome(row, result, reason, round(seconds, 1), dict(found.values), log)


def _not_run(rows: Sequence[Row], why: str) -> list[Outcome]:
    return [Outcome(row, "not run", why) for row in rows]


def _result(outcome: Outcome) -> str:
    return f"{outcome.result}: {outcome.reason}" if outcome.reason else outcome.result


def tail(log: Path, lines: int = TAIL_LINES) -> str:
    return "\n".join(f"    {line}" for line in log.read_text(errors="replace").splitlines()[-lines:])


def table(outcomes: Sequence[Outcome]) -> str:
    """One line a row: name, needs, result with its reason, seconds, figures."""
    cells = [("row", "needs", "result", "seconds", "figures")]
    for outcome in outcomes:
        seconds = "" if outcome.seconds is None else f"{outcome.seconds:.0f}"
        needs, values = str(outcome.row.needs), figures.text(outcome.values)
        cells.append((outcome.row.name, needs, _result(outcome), seconds, values))
    widths = [max(len(row[column]) for row in cells) for column in range(4)]
    lines = [
        " | ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]) for row in cells
    ]
    lines.insert(1, "-|-".join(["-" * width for width in widths] + ["-" * len("figures")]))
    return "\n".join(line.rstrip() for line in lines)

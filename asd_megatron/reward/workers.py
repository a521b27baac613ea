"""Worker processes that answer one JSON request at a time, each within a bounded time, even if workers die.

The workers are programs of their own on pipes: nothing is forked from a process that holds CUDA or gloo threads, and no
signal is used here, so that the pool works in any thread.

Two limits hold for an answer. Processor time is what counts for a computation: a busy machine does not turn a right
answer into a timeout. Wall time, much longer, catches a worker that waits without computing.
"""

from __future__ import annotations

import json
import logging
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asd_megatron.distributed import activity
from asd_megatron.reward.base import RewardError

log = logging.getLogger(__name__)

MAX_FAILED_STARTS = 3
MAX_DEATHS_IN_A_ROW = 20
LOOK_SECONDS = 1.0  # at most between two looks at the workers
ATTEMPTS = 2  # a request that two workers died of is given up
PROGRAM = Path(__file__).with_name("worker_program.py")
MEMORY_BYTES = 4 << 30  # of one worker's address space: an answer like 10^(10^10) must not take the machine down
WALL_FACTOR = 10  # wall time of an answer where reward.wall_timeout_seconds is not set, in units of its processor time


@dataclass(frozen=True)
class Limits:
    """The limits of a worker: seconds of wall and of processor time (None: no limit) for an answer, wall time to load,
    bytes of address space (None: no limit)."""

    wall_seconds: float
    cpu_seconds: float | None = None
    start_seconds: float = 300.0  # importing, on a busy machine
    memory_bytes: int | None = None


@dataclass(frozen=True)
class Outcome:
    """A worker's `answer`, or (None) why there is none: `timeout` or `error`, with a `reason`."""

    answer: Mapping[str, Any] | None
    failure: str = ""
    reason: str = ""

    @property
    def error(self) -> str:
        """Why there is no verdict, as the pool or the judge says; empty if neither does."""
        return self.reason or str((self.answer or {}).get("error", ""))


class _Worker:
    """One process: starting, idle, or busy with request `job` until `deadline`."""

    def __init__(self, command: Sequence[str], start_seconds: float, *, own_stderr: bool) -> None:
        self.stderr = tempfile.TemporaryFile(mode="a+b", buffering=0) if own_stderr else None  # noqa: SIM115
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr,
            bufsize=0,
            start_new_session=True,  # so that kill() ends what it started too
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self.buffer = b""
        self.ready = False
        self.job: int | None = None
        self.deadline = time.monotonic() + start_seconds

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """The complete lines that have arrived, and whether the pipe is closed (the worker is dead)."""
        data = os.read(self.stdout.fileno(), 65_536)
        *lines, self.buffer = (self.buffer + data).split(b"\n")
        return [json.loads(line) for line in lines], not data

    def stderr_tail(self) -> str:
        if self.stderr is None:
            return "its output, if any, is above"
        self.stderr.seek(0)
        lines = self.stderr.read()[-2_000:].decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it wrote nothing"

    def kill(self) -> int:
        """End the process and its children, and free its pipes; returns the exit status."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        status = self.process.wait()
        for pipe in (self.stdin, self.stdout, self.stderr):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
        return status


class WorkerPool:
    """`size` workers running `command`. One that dies or exceeds a limit is replaced and counted.

    `own_stderr`: what a worker writes to stderr is kept for error messages; else it goes where the trainer's goes.
    The limits on processor time and memory are the worker's to set (`worker_program`). Raises RewardError when workers
    cannot be started, or keep dying with no answer in between. `may_end`: the judge is a user's function, which may end
    its process: a request that workers died of is answered so, however many there are in a row.
    """

    def __init__(
        self,
        command: Sequence[str],
        size: int,
        limits: Limits,
        counters: dict[str, int],
        *,
        own_stderr: bool = True,
        may_end: bool = False,
    ) -> None:
        self.command, self.limits, self.counters, self.own_stderr = list(command), limits, counters, own_stderr
        self.may_end = may_end
        self._failed_starts = self._deaths = 0
        self._closed = False
        self._workers: list[_Worker] = []
        for _ in range(size):
            self._workers.append(self._start())
        try:
            self.run([])  # a broken installation shows at the start
        except BaseException:
            self.close()
            raise

    def _start(self) -> _Worker:
        try:
            return _Worker(self.command, self.limits.start_seconds, own_stderr=self.own_stderr)
        except OSError as e:
            raise RewardError(f"cannot start a reward worker: {e}") from e

    def run(self, requests: Sequence[Mapping[str, Any]]) -> list[Outcome]:
        """One outcome for each request, in order. Without requests: returns when all workers are ready."""
        if self._closed:
            raise RewardError("the reward workers are closed already")
        outcomes: list[Outcome | None] = [None] * len(requests)
        queue, tries = deque(range(len(requests))), [0] * len(requests)
        try:
            while any(o is None for o in outcomes) or not (requests or all(w.ready for w in self._workers)):
                self._assign(requests, queue, tries, outcomes)
                self._wait(queue, tries, outcomes)
        except BaseException:
            self._abandon()
            raise
        return [o for o in outcomes if o is not None]

    def _assign(
        self, requests: Sequence[Mapping[str, Any]], queue: deque[int], tries: list[int], outcomes: list[Outcome | None]
    ) -> None:
        for slot, worker in enumerate(self._workers):
            if not queue or not worker.ready or worker.job is not None:
                continue
            worker.job = queue.popleft()
            worker.deadline = time.monotonic() + self.limits.wall_seconds
            try:
                worker.stdin.write(json.dumps(requests[worker.job]).encode() + b"\n")
            except OSError:  # it died while idle, through no fault of the request
                queue.appendleft(worker.job)
                worker.job = None
                self._died(slot, queue, tries, outcomes)

    def _wait(self, queue: deque[int], tries: list[int], outcomes: list[Outcome | None]) -> None:
        """Wait until a worker writes or the next deadline passes, and act on it."""
        waiting = [(slot, w) for slot, w in enumerate(self._workers) if w.job is not None or not w.ready]
        if not waiting:
            return
        with selectors.DefaultSelector() as selector:
            for slot, worker in waiting:
                selector.register(worker.stdout, selectors.EVENT_READ, slot)
            pause = min(w.deadline for _, w in waiting) - time.monotonic()
            events = selector.select(min(max(pause, 0.0), LOOK_SECONDS))
        activity.mark()  # of the ranks' watch: the limits on an answer bound this wait
        readable = {key.data for key, _ in events}
        for slot in readable:
            worker = self._workers[slot]
            messages, dead = worker.read()
            for message in messages:
                self._take(worker, message, outcomes)
            if dead:
                self._died(slot, queue, tries, outcomes)
        for slot, worker in waiting:
            if slot not in readable and time.monotonic() >= worker.deadline:
                self._expired(slot, outcomes)

    def _take(self, worker: _Worker, message: dict[str, Any], outcomes: list[Outcome | None]) -> None:
        if not worker.ready:
            worker.ready, self._failed_starts = True, 0
        elif worker.job is not None:
            outcomes[worker.job], worker.job = Outcome(message), None
            self._deaths = 0

    def _expired(self, slot: int, outcomes: list[Outcome | None]) -> None:
        worker = self._workers[slot]
        if worker.job is None:
            raise RewardError(f"reward workers do not start: none was ready within {self.limits.start_seconds:g} s")
        worker.kill()
        limit = f"{self.limits.wall_seconds:g} s of wall time (reward.wall_timeout_seconds)"
        outcomes[worker.job] = Outcome(None, "timeout", f"no answer within {limit}")
        self._replace(slot)

    def _died(self, slot: int, queue: deque[int], tries: list[int], outcomes: list[Outcome | None]) -> None:
        worker = self._workers[slot]
        tail, status = worker.stderr_tail(), worker.kill()
        if status == -signal.SIGPROF and worker.job is not None:
            limit = f"{self.limits.cpu_seconds:g} s of processor time (reward.timeout_seconds)"
            outcomes[worker.job] = Outcome(None, "timeout", f"no answer within {limit}")
            self._replace(slot)
            return
        reason = f"a reward worker ended with status {status}: {tail}"
        if not worker.ready:
            self._failed_starts += 1
            if self._failed_starts >= MAX_FAILED_STARTS:
                raise RewardError(
                    f"reward workers do not start. The last one: {reason}. Command: {' '.join(self.command)}"
                )
        else:
            self._deaths += 1
            if self._deaths >= MAX_DEATHS_IN_A_ROW:
                raise RewardError(
                    f"{self._deaths} reward workers in a row died without an answer. The last one: {reason}. "
                    "Is the machine out of memory? Lower reward.workers"
                )
        log.warning("%s; it is replaced", reason)
        if worker.job is not None:
            tries[worker.job] += 1
            if tries[worker.job] >= ATTEMPTS:
                outcomes[worker.job] = Outcome(None, "error", reason)
                self._deaths = 0 if self.may_end else self._deaths
            else:
                queue.appendleft(worker.job)
        self._replace(slot)

    def _replace(self, slot: int) -> None:
        self.counters["restarts"] += 1
        self._workers[slot] = self._start()

    def _abandon(self) -> None:
        """Replace the workers that are busy with a request that nobody waits for."""
        for slot, worker in enumerate(self._workers):
            if worker.job is not None or not worker.ready:
                worker.kill()
                self._workers[slot] = self._start()

    def close(self) -> None:
        """End all workers. Safe to call twice."""
        if not self._closed:
            self._closed = True
            for worker in self._workers:
                worker.kill()


def count_unjudged(counters: dict[str, int], what: str, outcome: Outcome, error: str = "") -> None:
    """Count and log an answer (`what`) that scores 0 without a verdict; `error` for want of the outcome's own."""
    name = "timeouts" if outcome.failure == "timeout" else "errors"
    counters[name] += 1
    log.warning("%s counted as 0: %s (%s so far: %d)", what, outcome.error or error, name, counters[name])


def judge_pool(
    judge: Path, size: int, timeout_seconds: float, wall_timeout_seconds: float | None, counters: dict[str, int]
) -> WorkerPool:
    """`size` workers of bounded memory that answer with the judge in a file (see `worker_program`)."""
    wall = wall_seconds(timeout_seconds, wall_timeout_seconds)
    if size < 1:
        raise RewardError("reward.workers must be at least 1")
    limits = Limits(wall, timeout_seconds, memory_bytes=MEMORY_BYTES)
    return WorkerPool(worker_command(judge, limits), size, limits, counters)


def wall_seconds(timeout_seconds: float, wall_timeout_seconds: float | None) -> float:
    """The limit on wall time. Raises RewardError for limits that contradict each other."""
    wall = WALL_FACTOR * timeout_seconds if wall_timeout_seconds is None else wall_timeout_seconds
    if not 0 < timeout_seconds <= wall:
        raise RewardError(
            f"reward.timeout_seconds ({timeout_seconds:g}, processor time) must be above 0 and at most"
            f" reward.wall_timeout_seconds ({wall:g}): lower the first, or raise or leave out the second"
        )
    return wall


def worker_command(
    judge: Path,
    limits: Limits,
    arguments: Sequence[str] = (),
    *,
    quiet: bool = True,
    path: Sequence[str] | None = None,
) -> list[str]:
    """The command line of a worker that runs the judge in the file `judge`; options as in `worker_program`."""
    settings = {
        "judge": str(judge),
        "arguments": list(arguments),
        "cpu_seconds": limits.cpu_seconds,
        "memory_bytes": limits.memory_bytes,
        "quiet": quiet,
        "path": None if path is None else list(path),
    }
    # -P: the folder of the program, where math.py is not the standard library's, stays off the worker's module path
    return [sys.executable, "-P", str(PROGRAM), json.dumps(settings)]

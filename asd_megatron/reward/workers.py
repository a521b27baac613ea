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
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asd_megatron.distributed import activity
from asd_megatron.reward.base import RewardError
from asd_megatron.reward.usage import Usage, usage_of_sessions

log = logging.getLogger(__name__)

MAX_FAILED_STARTS = 3
MAX_DEATHS_IN_A_ROW = 20
LOOK_SECONDS = 1.0  # at most between two looks at the workers
ATTEMPTS = 2  # a request that two workers died of is given up
PROGRAM = Path(__file__).with_name("worker_program.py")
GIB = 1 << 30
MEMORY_BYTES = 4 * GIB  # of one worker's address space: an answer like 10^(10^10) must not take the machine down
WALL_FACTOR = 10  # wall time of an answer where reward.wall_timeout_seconds is not set, in units of its processor time


@dataclass(frozen=True)
class Limits:
    """The limits of a worker: seconds of wall and of processor time (None: no limit) for an answer, wall time to load,
    bytes of address space (None: no limit). Of a worker with all processes that it has started, looked at once a second
    while it judges: resident bytes and tasks (None: no limit)."""

    wall_seconds: float
    cpu_seconds: float | None = None
    start_seconds: float = 300.0  # importing, on a busy machine
    memory_bytes: int | None = None
    resident_bytes: int | None = None
    tasks: int | None = None

    def exceeded(self, usage: Usage) -> str:
        """Which limit a worker exceeds; empty if none."""
        limit = self.resident_bytes
        if limit is not None and usage.resident_bytes > limit and usage.proportional_bytes() > limit:
            return f"{limit / GIB:.3g} GiB of memory (reward.memory_gb)"
        if self.tasks is not None and usage.tasks > self.tasks:
            return f"{self.tasks} processes and threads"
        return ""


@dataclass(frozen=True)
class Outcome:
    """A worker's `answer`, or (None) why there is none: `timeout`, `error` (workers died of it) or `excess` (of memory
    or processes), with a `reason`."""

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
        """The complete lines that have arrived, and whether the worker is of no more use: its pipe is closed, or a
        user's function has written into it."""
        data = os.read(self.stdout.fileno(), 65_536)
        *lines, self.buffer = (self.buffer + data).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            return [], True
        return (messages, not data) if all(isinstance(m, dict) for m in messages) else ([], True)

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


class _Call:
    """The requests of one call of `run`: those in the queue, and the outcomes that there are."""

    def __init__(
        self, requests: Sequence[Mapping[str, Any]], check: Callable[[int, Outcome], None] | None = None
    ) -> None:
        self.requests, self.check = requests, check
        self.queue = deque(range(len(requests)))
        self.tries = [0] * len(requests)
        self.outcomes: dict[int, Outcome] = {}

    @property
    def open(self) -> bool:
        return len(self.outcomes) < len(self.requests)

    def finish(self, request: int, outcome: Outcome) -> None:
        self.outcomes[request] = outcome
        if self.check is not None:
            self.check(request, outcome)


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
        self._looked = 0.0  # when usage was looked at
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

    def run(
        self, requests: Sequence[Mapping[str, Any]], check: Callable[[int, Outcome], None] | None = None
    ) -> list[Outcome]:
        """One outcome for each request, in order. Without requests: returns when all workers are ready. `check` is
        given each outcome with its request's number as soon as there is one; what it raises ends the call."""
        if self._closed:
            raise RewardError("the reward workers are closed already")
        call = _Call(requests, check)
        try:
            while call.open or not (requests or all(w.ready for w in self._workers)):
                self._assign(call)
                self._wait(call)
        except BaseException:
            self._abandon()
            raise
        return [call.outcomes[i] for i in range(len(requests))]

    def _assign(self, call: _Call) -> None:
        for slot, worker in enumerate(self._workers):
            if not call.queue or not worker.ready or worker.job is not None:
                continue
            worker.job = call.queue.popleft()
            worker.deadline = time.monotonic() + self.limits.wall_seconds
            try:
                worker.stdin.write(json.dumps(call.requests[worker.job]).encode() + b"\n")
            except OSError:  # it died while idle, through no fault of the request
                call.queue.appendleft(worker.job)
                worker.job = None
                self._died(slot, call)

    def _wait(self, call: _Call) -> None:
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
                self._take(worker, message, call)
            if dead:
                self._died(slot, call)
        for slot, worker in waiting:
            if slot not in readable and time.monotonic() >= worker.deadline:
                self._expired(slot, call)
        self._end_excessive(call)

    def _take(self, worker: _Worker, message: dict[str, Any], call: _Call) -> None:
        if not worker.ready:
            worker.ready, self._failed_starts = True, 0
        elif worker.job is not None:
            job, worker.job, self._deaths = worker.job, None, 0
            call.finish(job, Outcome(message))

    def _expired(self, slot: int, call: _Call) -> None:
        worker = self._workers[slot]
        if worker.job is None:
            raise RewardError(f"reward workers do not start: none was ready within {self.limits.start_seconds:g} s")
        worker.kill()
        limit = f"{self.limits.wall_seconds:g} s of wall time (reward.wall_timeout_seconds)"
        self._replace(slot)
        call.finish(worker.job, Outcome(None, "timeout", f"no answer within {limit}"))

    def _end_excessive(self, call: _Call) -> None:
        """End the workers that use more of the machine than they may."""
        unlimited = self.limits.resident_bytes is None and self.limits.tasks is None
        if unlimited or time.monotonic() < self._looked + LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        usage = usage_of_sessions()
        for slot, worker in enumerate(self._workers):
            excess = self.limits.exceeded(usage.get(worker.process.pid, Usage()))
            if excess and worker.job is not None:
                worker.kill()
                self._replace(slot)
                call.finish(worker.job, Outcome(None, "excess", f"used more than {excess}"))

    def _died(self, slot: int, call: _Call) -> None:
        worker = self._workers[slot]
        tail, status = worker.stderr_tail(), worker.kill()
        if status == -signal.SIGPROF and worker.job is not None:
            limit = f"{self.limits.cpu_seconds:g} s of processor time (reward.timeout_seconds)"
            self._replace(slot)
            call.finish(worker.job, Outcome(None, "timeout", f"no answer within {limit}"))
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
        self._replace(slot)
        if worker.job is not None:
            call.tries[worker.job] += 1
            if call.tries[worker.job] >= ATTEMPTS:
                self._deaths = 0 if self.may_end else self._deaths
                call.finish(worker.job, Outcome(None, "error", reason))
            else:
                call.queue.appendleft(worker.job)

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

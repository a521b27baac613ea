"""Worker processes that answer one JSON request at a time, each within a bounded time, whatever happens to a worker.

The workers are programs of their own on pipes: nothing is forked from a process that holds CUDA or gloo threads, no
module of the trainer is imported again, and no signal is used here, so that the pool works in any thread.
"""

from __future__ import annotations

import json
import logging
import os
import selectors
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

from asd_megatron.reward.base import RewardError

log = logging.getLogger(__name__)

START_SECONDS = 120.0  # importing, on a machine that is busy
MAX_FAILED_STARTS = 3
MAX_DEATHS_IN_A_ROW = 20
ATTEMPTS = 2  # a request that two workers died of is given up
PROGRAM = Path(__file__).with_name("worker_program.py")
MEMORY_BYTES = 4 << 30  # of one worker's address space: an answer like 10^(10^10) must not take the machine down
ALARM_SLACK_SECONDS = 5.0


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

    def __init__(self, command: Sequence[str]) -> None:
        self.stderr = tempfile.TemporaryFile(mode="a+b", buffering=0)  # noqa: SIM115 - closed by kill()
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.stderr, bufsize=0
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self.buffer = b""
        self.ready = False
        self.job: int | None = None
        self.deadline = time.monotonic() + START_SECONDS

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """Whole lines that have arrived, and whether the pipe is closed (the worker is dead)."""
        data = os.read(self.stdout.fileno(), 65_536)
        *lines, self.buffer = (self.buffer + data).split(b"\n")
        return [json.loads(line) for line in lines], not data

    def last_words(self) -> str:
        self.stderr.seek(0)
        lines = self.stderr.read()[-2_000:].decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it wrote nothing"

    def kill(self) -> int:
        """End the process and free its pipes; returns the exit status."""
        self.process.kill()
        status = self.process.wait()
        for pipe in (self.stdin, self.stdout, self.stderr):
            with suppress(OSError):
                pipe.close()
        return status


class WorkerPool:
    """`size` workers running `command`. One that dies or exceeds `timeout_seconds` is replaced and counted.

    Raises RewardError when workers cannot be started, or keep dying with no answer in between.
    """

    def __init__(self, command: Sequence[str], size: int, timeout_seconds: float, counters: dict[str, int]) -> None:
        self.command, self.timeout_seconds, self.counters = list(command), timeout_seconds, counters
        self._failed_starts = self._deaths = 0
        self._closed = False
        self._workers: list[_Worker] = []
        for _ in range(size):
            self._workers.append(self._start())
        self.run([])  # a broken installation shows at the start

    def _start(self) -> _Worker:
        try:
            return _Worker(self.command)
        except OSError as e:
            raise RewardError(f"cannot start a reward worker: {e}") from e

    def run(self, requests: Sequence[Mapping[str, Any]]) -> list[Outcome]:
        """One outcome a request, in order. Without requests: returns when all workers are ready."""
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
            worker.deadline = time.monotonic() + self.timeout_seconds
            try:
                worker.stdin.write(json.dumps(requests[worker.job]).encode() + b"\n")
            except OSError:  # it died while idle, through no fault of the request
                queue.appendleft(worker.job)
                worker.job = None
                self._died(slot, queue, tries, outcomes)

    def _wait(self, queue: deque[int], tries: list[int], outcomes: list[Outcome | None]) -> None:
        """Sleep until a worker says something or the next deadline has come, and act on it."""
        waiting = [(slot, w) for slot, w in enumerate(self._workers) if w.job is not None or not w.ready]
        if not waiting:
            return
        with selectors.DefaultSelector() as selector:
            for slot, worker in waiting:
                selector.register(worker.stdout, selectors.EVENT_READ, slot)
            pause = min(w.deadline for _, w in waiting) - time.monotonic()
            events = selector.select(max(pause, 0.0))
        spoke = {key.data for key, _ in events}
        for slot in spoke:
            worker = self._workers[slot]
            messages, dead = worker.read()
            for message in messages:
                self._take(worker, message, outcomes)
            if dead:
                self._died(slot, queue, tries, outcomes)
        for slot, worker in waiting:
            if slot not in spoke and time.monotonic() >= worker.deadline:
                self._expired(slot, queue, tries, outcomes)

    def _take(self, worker: _Worker, message: dict[str, Any], outcomes: list[Outcome | None]) -> None:
        if not worker.ready:
            worker.ready, self._failed_starts = True, 0
        elif worker.job is not None:
            outcomes[worker.job], worker.job = Outcome(message), None
            self._deaths = 0

    def _expired(self, slot: int, queue: deque[int], tries: list[int], outcomes: list[Outcome | None]) -> None:
        worker = self._workers[slot]
        if worker.job is None:
            self._died(slot, queue, tries, outcomes)
            return
        outcomes[worker.job] = Outcome(None, "timeout", f"no verdict within {self.timeout_seconds:g} s")
        worker.kill()
        self._replace(slot)

    def _died(self, slot: int, queue: deque[int], tries: list[int], outcomes: list[Outcome | None]) -> None:
        worker = self._workers[slot]
        words = worker.last_words()
        reason = f"a reward worker ended with status {worker.kill()}: {words}"
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
            else:
                queue.appendleft(worker.job)
        self._replace(slot)

    def _replace(self, slot: int) -> None:
        self.counters["restarts"] += 1
        self._workers[slot] = self._start()

    def _abandon(self) -> None:
        """Leave no worker busy with a request that nobody waits for."""
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


def judge_pool(judge: Path, size: int, timeout_seconds: float, counters: dict[str, int]) -> WorkerPool:
    """`size` workers of bounded memory that answer with the judge in a file (see `worker_program`)."""
    if not timeout_seconds > 0 or size < 1:
        raise RewardError("reward.timeout_seconds must be above 0 and reward.workers at least 1")
    alarm = timeout_seconds + ALARM_SLACK_SECONDS
    # -P: the folder of the program, where math.py is not the standard library's, stays off the worker's module path
    command = [sys.executable, "-P", str(PROGRAM), str(judge), str(alarm), str(MEMORY_BYTES)]
    return WorkerPool(command, size, timeout_seconds, counters)

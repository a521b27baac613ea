"""Runs tested programs in sandboxes, several at a time, with bounds on time, memory and output that hold from outside.

A sandbox runs the tests of one program, each in a process of its own (`supervisor.py`). It is replaced by a new one for
the tests that remain when a test has left files behind, has exceeded the memory of the sandbox or has ended it.
"""

from __future__ import annotations

import marshal
import os
import re
import selectors
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path

from asd_megatron.sandbox import supervisor
from asd_megatron.sandbox.launch import Interpreter, Launched, Protections, SandboxError, SandboxLimits, launch

START_SECONDS = 300.0  # until the supervisor is ready, on a busy machine
GRACE_SECONDS = 20.0  # for the supervisor to act on its own limit on wall time
LOOK_SECONDS = 0.1  # at most between two looks at the memory and processor time of sandboxes
MEMORY_SLACK = 64 << 20  # of the supervisor, and pages that processes share and are counted twice
CPU_SLACK = 0.5  # seconds: a single process is ended by the supervisor first
ATTEMPTS = 2
MAX_FAILED_STARTS = 6  # in a row
READ_BYTES = 1 << 18
HEADER_BYTES = 20
CHILD = re.compile(rb'"child-pid": (\d+)\D')  # bubblewrap's --info-fd

# Modules of the standard library that programs often import: loaded once in the supervisor, before it forks.
PRELOADED = frozenset(
    re.split(
        r"\s+",
        "array bisect collections copy dataclasses datetime decimal enum fractions functools heapq itertools json math"
        " operator queue random re string threading time typing",
    )
)
IMPORTS = re.compile(r"^\s*(?:from|import)\s+(\w+)", re.MULTILINE)


class Status(StrEnum):
    """How a test of a program ended. All but `finished` are failures of the program."""

    FINISHED = "finished"  # with exit status 0, and with its verdict if it has to give one
    FAILED = "failed"  # an exception, or another exit status
    NO_VERDICT = "no_verdict"  # ended with status 0 before the test was over
    SIGNAL = "signal"  # ended by a signal: a crash
    CPU_TIME = "cpu_time"
    WALL_TIME = "wall_time"
    OUTPUT = "output"  # too much of it
    MEMORY = "memory"  # all processes together; one process alone gets MemoryError
    SANDBOX = "sandbox"  # the supervisor died with it: the machine was out of memory


# in the order of the supervisor's numbers
_STATUSES = (
    Status.FINISHED,
    Status.FAILED,
    Status.NO_VERDICT,
    Status.SIGNAL,
    Status.CPU_TIME,
    Status.WALL_TIME,
    Status.OUTPUT,
)


@dataclass(frozen=True)
class StdinTest:
    """Runs the program as `__main__` with this standard input."""

    text: str


@dataclass(frozen=True)
class CallTest:
    """Calls `name`, `Class.name` or `Class().name` of the program with these arguments (values as in JSON)."""

    function: str
    arguments: tuple[object, ...]


@dataclass(frozen=True)
class StatementsTest:
    """Executes Python statements after the program; `supervisor.RECORD(index, value)` in them records a value."""

    text: str


Test = StdinTest | CallTest | StatementsTest


@dataclass(frozen=True)
class TestedProgram:
    """A program with its tests; `setup` is executed before it. `output_bytes`: of a test, where the limits allow
    less."""

    program: str
    tests: Sequence[Test]
    setup: str = ""
    output_bytes: int = 0


@dataclass(frozen=True)
class TestResult:
    """How one test ended. `detail`: the exit status or the number of a signal. `stderr`: its end. `verdict`: the lines
    of recorded values (untrusted JSON, written by the tested process), without the last one."""

    status: Status
    detail: int = 0
    stdout: bytes = b""
    stderr: str = ""
    verdict: tuple[bytes, ...] = ()


@dataclass
class _Running:
    """A sandbox at work on a program's tests from number `offset` on."""

    launched: Launched
    job: int
    offset: int
    deadline: float
    cpu_base: float = 0.0  # processor time of all processes when the present test began
    buffer: bytearray = field(default_factory=bytearray)
    stderr: bytearray = field(default_factory=bytearray)
    ready: bool = False
    info: bytes = b""
    handle: int | None = None  # of process 1 of the sandbox

    def read_info(self) -> None:
        """Learn which process is number 1 of the sandbox."""
        if self.launched.info is None:
            return
        with suppress(OSError):
            self.info += os.read(self.launched.info, 4_096)
            found = CHILD.search(self.info)
            if found is None:
                return  # it is written in pieces
            first = int(found[1])
            self.handle = os.pidfd_open(first)
            self.launched.first = first
            # where the machine runs out of memory, the kernel should end this and not the trainer
            Path(f"/proc/{first}/oom_score_adj").write_text("1000")

    def end(self) -> None:
        """End all processes of the sandbox and free its pipes."""
        process = self.launched.process
        if process.poll() is None and self.handle is not None:
            with suppress(OSError):
                signal.pidfd_send_signal(self.handle, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                process.wait(5.0)  # bubblewrap ends when the last process of the sandbox has
        if process.poll() is None or self.launched.info is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
        for fd in (self.launched.info, self.handle):
            if fd is not None:
                os.close(fd)
        if self.launched.folder is not None:
            self.launched.folder.cleanup()


class SandboxPool:
    """Runs programs in at most `size` sandboxes at a time. `on_wait` is called at least every LOOK_SECONDS."""

    def __init__(
        self,
        interpreter: Interpreter,
        limits: SandboxLimits,
        *,
        size: int = 1,
        protections: Protections = Protections(),  # noqa: B008 (frozen)
        on_wait: Callable[[], None] = lambda: None,
    ) -> None:
        self.interpreter, self.limits, self.size, self.protections = interpreter, limits, size, protections
        self.restarts = 0
        self.last_failure = ""  # why the last sandbox that did not start did not
        self._on_wait = on_wait
        self._running: list[_Running] = []
        self._failed_starts = 0

    def run(
        self,
        programs: Sequence[TestedProgram],
        wanted: Callable[[int, Sequence[TestResult]], bool] = lambda program, results: True,
    ) -> list[list[TestResult] | None]:
        """The results of every program's tests, in order; None for a program whose sandbox could not be started.

        After each test `wanted(program, its results so far)` says whether the remaining tests are run; if not, they
        have no results. Raises SandboxError if no sandbox starts any more.
        """
        results: list[list[TestResult] | None] = [[] for _ in programs]
        queue = deque((job, 0) for job, program in enumerate(programs) if program.tests)
        failures = [0] * len(programs)
        try:
            while queue or self._running:
                while queue and len(self._running) < self.size:
                    job, offset = queue.popleft()
                    self._running.append(self._start(programs[job], job, offset))
                for running in self._wait():
                    self._advance(running, programs, wanted, results, queue, failures)
        finally:
            while self._running:
                self._running.pop().end()
        return results

    def _start(self, program: TestedProgram, job: int, offset: int) -> _Running:
        named = set(IMPORTS.findall(program.setup) + IMPORTS.findall(program.program))
        data = {
            "program": program.program,
            "setup": program.setup,
            "tests": [_plain(test) for test in program.tests[offset:]],
            "path": list(self.interpreter.packages),
            "preload": sorted(named & PRELOADED),
            "sandboxed": self.protections.namespaces,
            "limits": asdict(self.limits) | {"output_bytes": max(self.limits.output_bytes, program.output_bytes)},
        }
        try:
            launched = launch(marshal.dumps(data, 2), self.interpreter, self.limits, self.protections)
        except OSError as e:
            raise SandboxError(f"a sandbox cannot be started: {e}") from e
        assert launched.process.stdout is not None and launched.process.stderr is not None
        os.set_blocking(launched.process.stdout.fileno(), False)
        os.set_blocking(launched.process.stderr.fileno(), False)
        return _Running(launched, job, offset, time.monotonic() + START_SECONDS)

    def _wait(self) -> list[_Running]:
        """Wait until a sandbox writes, for LOOK_SECONDS at most; those that wrote or are to be looked at."""
        with selectors.DefaultSelector() as selector:
            for running in self._running:
                process = running.launched.process
                assert process.stdout is not None
                selector.register(process.stdout, selectors.EVENT_READ, running)
                if running.launched.info is not None and running.launched.first is None:
                    selector.register(running.launched.info, selectors.EVENT_READ, None)
            events = selector.select(LOOK_SECONDS)
        self._on_wait()
        for running in self._running:
            if running.launched.first is None:
                running.read_info()
        readable = {id(key.data) for key, _ in events}
        now = time.monotonic()
        return [r for r in self._running if id(r) in readable or now >= r.deadline or self._exceeded(r)]

    def _exceeded(self, running: _Running) -> Status | None:
        """Which limit the processes of the present test exceed, all together."""
        if time.monotonic() >= running.deadline:
            return Status.WALL_TIME
        if running.launched.first is None or not running.ready:
            return None
        resident, seconds = usage(running.launched.first)
        if resident > self.limits.memory_bytes + MEMORY_SLACK:
            return Status.MEMORY
        beyond = seconds - running.cpu_base > self.limits.cpu_seconds + CPU_SLACK
        return Status.CPU_TIME if beyond else None

    def _advance(
        self,
        running: _Running,
        programs: Sequence[TestedProgram],
        wanted: Callable[[int, Sequence[TestResult]], bool],
        results: list[list[TestResult] | None],
        queue: deque[tuple[int, int]],
        failures: list[int],
    ) -> None:
        """Take what a sandbox has written, and act on its end or on a limit that it has exceeded."""
        done = results[running.job]
        assert done is not None
        alive = _read(running)
        more, leftovers = self._take(running, done, lambda: wanted(running.job, done))
        complete = not more or len(done) == len(programs[running.job].tests)
        exceeded = self._exceeded(running)
        if alive and not (complete or leftovers or exceeded):
            return
        self._running.remove(running)
        running.end()
        if complete:
            return
        if not running.ready:
            self._did_not_start(running)
            failures[running.job] += 1
            if failures[running.job] >= ATTEMPTS:
                results[running.job] = None
                return
        elif not leftovers:
            done.append(TestResult(exceeded or Status.SANDBOX))
            self.restarts += 1
            if len(done) == len(programs[running.job].tests) or not wanted(running.job, done):
                return
        queue.appendleft((running.job, len(done)))

    def _take(self, running: _Running, done: list[TestResult], wanted: Callable[[], bool]) -> tuple[bool, bool]:
        """Append the complete results of a sandbox's output: (whether more are wanted, whether a test left files)."""
        if not running.ready and running.buffer.startswith(supervisor.READY):
            del running.buffer[: len(supervisor.READY)]
            running.ready, self._failed_starts = True, 0
            self._begin_test(running)
        while running.ready and len(running.buffer) >= HEADER_BYTES:
            header = [int.from_bytes(running.buffer[i : i + 4], "big") for i in range(0, HEADER_BYTES, 4)]
            if header[0] == supervisor.LEFTOVERS:
                return True, True
            end = HEADER_BYTES + sum(header[2:])
            if len(running.buffer) < end:
                break
            done.append(_result(header, bytes(running.buffer[HEADER_BYTES:end])))
            del running.buffer[:end]
            self._begin_test(running)
            if not wanted():
                return False, False
        return True, False

    def _begin_test(self, running: _Running) -> None:
        """The limits from outside count from here."""
        running.deadline = time.monotonic() + self.limits.wall_seconds + GRACE_SECONDS
        if running.launched.first is not None:
            running.cpu_base = usage(running.launched.first)[1]

    def _did_not_start(self, running: _Running) -> None:
        self._failed_starts += 1
        self.restarts += 1
        self.last_failure = running.stderr.decode(errors="replace").strip()[-500:] or "it wrote nothing"
        if self._failed_starts >= MAX_FAILED_STARTS:
            raise SandboxError(
                f"{self._failed_starts} sandboxes in a row did not start. The last one: {self.last_failure}."
                " `asd-megatron sandbox check` says what this machine lacks"
            )


def _plain(test: Test) -> tuple[object, ...]:
    if isinstance(test, StdinTest):
        return "stdin", test.text
    if isinstance(test, CallTest):
        return "call", test.function, list(test.arguments)
    return "statements", test.text


def _read(running: _Running) -> bool:
    """Read what is there; False at the end of the output."""
    process = running.launched.process
    assert process.stdout is not None and process.stderr is not None
    with suppress(BlockingIOError):
        running.stderr += os.read(process.stderr.fileno(), 4_096)
        del running.stderr[:-4_096]
    try:
        data = os.read(process.stdout.fileno(), READ_BYTES)
    except BlockingIOError:
        return True
    running.buffer += data
    return bool(data)


def _result(header: list[int], body: bytes) -> TestResult:
    status, detail, stdout, stderr, _ = header
    lines = body[stdout + stderr :].splitlines()
    return TestResult(
        _STATUSES[status],
        detail,
        body[:stdout],
        body[stdout : stdout + stderr].decode(errors="replace").strip(),
        tuple(lines[:-1]),
    )


def usage(first: int) -> tuple[int, float]:
    """Resident memory (bytes; pages that several share count for each) and processor time (seconds) of a process and
    its descendants, the ended ones' too."""
    resident, ticks, open_ = 0, 0, [first]
    while open_:
        process = open_.pop()
        with suppress(OSError, ValueError, IndexError):
            # what follows the name: state is field 3 of proc(5), utime to cstime are 14 to 17, rss is 24
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
            ticks += sum(map(int, fields[11:15]))
            resident += int(fields[21])
            for task in os.listdir(f"/proc/{process}/task"):
                open_ += map(int, Path(f"/proc/{process}/task/{task}/children").read_text().split())
    return resident * os.sysconf("SC_PAGE_SIZE"), ticks / os.sysconf("SC_CLK_TCK")

"""Signals that ask a training program to stop after the step in flight: received by a rank, passed on by a launcher."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
REPEAT_SECONDS = 5.0
"""Signals that arrive within this time are one request: Slurm and a launcher may both send it to a rank."""


class StopSignals:
    """As a context, receives SIGUSR1 and SIGTERM, also those that the parent ignores: `received` is the name of the
    first, None before. A second one after REPEAT_SECONDS ends the process at once, with exit status 128 + n.

    A thread reads the signals from Python's wakeup descriptor, so it does not matter what the main thread waits for. If
    another rank of this node has ended, the first signal ends the process: torchrun ends the remaining ranks by SIGTERM
    after one has failed, and they may be waiting for that one in a collective. Outside the main thread, where Python
    installs no handlers, nothing is received.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._reader, self._writer = socket.socketpair()
            self._writer.setblocking(False)
            self._descriptor = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            for number in SIGNALS:
                self._before[number] = signal.signal(number, _handle)
                signal.siginterrupt(number, False)  # system calls of native threads go on
            threading.Thread(target=self._watch, name="stop signals", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before:
            for number, handler in self._before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
            self._before.clear()
            signal.set_wakeup_fd(self._descriptor)
            self._writer.close()  # ends the thread

    def _watch(self) -> None:
        with self._reader:
            while number := self._reader.recv(1):
                if number[0] in SIGNALS:
                    self._receive(signal.Signals(number[0]))

    def _receive(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if self.received is None and not _neighbour_has_ended():
            self.received, self._since = number.name, now
        elif now - self._since > REPEAT_SECONDS:
            os._exit(128 + number)


def _handle(number: int, frame: FrameType | None) -> None:
    """Installed so that Python writes the signal's number to the wakeup descriptor; nothing is left to do."""


def _neighbour_has_ended() -> bool:
    """Whether fewer processes run under this rank's torchrun than it started."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    ranks = ranks_of(os.getppid())
    return os.getpid() in ranks and len(ranks) < int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def ranks_of(launcher: int) -> list[int]:
    """The processes that `launcher` has started as ranks and that still run; [] without /proc."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, parent = (path / "stat").read_bytes().rpartition(b")")[2].split()[:2]
            runs = int(parent) == launcher and state not in (b"Z", b"X")
            if runs and any(word.startswith(b"LOCAL_RANK=") for word in (path / "environ").read_bytes().split(b"\0")):
                found.append(int(path.name))
    return found


@contextmanager
def forwarded(processes: Callable[[], list[int]]) -> Iterator[None]:
    """Inside, SIGUSR1 and SIGTERM are sent on to `processes`, whose end this process then waits for. While there are
    none the signal ends this process."""

    def forward(number: int, frame: FrameType | None) -> None:
        receivers = processes()
        for process in receivers:
            with suppress(ProcessLookupError):
                os.kill(process, number)
        if not receivers:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    before = {number: signal.signal(number, forward) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""Signals that ask a training program to stop after the step in flight: received by a rank, passed on by a launcher.

One request may arrive as several signals, and a second one has to be told from them:

    SIGUSR1, SIGTERM, SIGHUP   Slurm, a launcher and a shell that loses its terminal may each send them to the same
                               process: what comes within REPEAT_SECONDS after the first signal is the same request
    SIGINT                     is a person's key. The launcher's ranks are in sessions of their own, so that a terminal
                               signals the launcher alone, which passes every press on once: what comes later than
                               PRESS_SECONDS after the first signal is a second request
"""

from __future__ import annotations

import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from asd_megatron.distributed.launcher import launcher_reports

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
KEPT_IGNORED = (signal.SIGINT, signal.SIGHUP)
"""Those that stay ignored where the parent ignores them: by a shell for a job in the background, by nohup."""
REPEAT_SECONDS = 5.0
PRESS_SECONDS = 0.3
ANNOUNCE_SECONDS = 15.0  # at most, for the ranks to agree on who says it
ANNOUNCEMENT = "the run stops after the step in flight and saves its state"
FORCED = 3
"""The number of Ctrl-C at which a launcher kills ranks that react to none."""


class StopSignals:
    """As a context, receives SIGNALS, SIGUSR1 and SIGTERM also where the parent ignores them: `received` is the name of
    the first, None before. What happens then is said at once, by global rank 0 if it has received one too.

    A second request, as the module defines it, ends the process at once, with exit status 128 + n, after it has `told`
    the user what was kept. So does the first one while the run has not `begun`: no step would be lost.

    A thread reads the signals from Python's wakeup descriptor, so it does not matter what the main thread waits for. If
    another rank of this node has ended, the first signal ends the process: torchrun ends the remaining ranks by SIGTERM
    after one has failed, and they may be waiting for that one in a collective. Outside the main thread, where Python
    installs no handlers, nothing is received.
    """

    def __init__(
        self,
        *,
        begun: Callable[[], bool] = lambda: True,
        told: Callable[[], None] = lambda: None,
        announcement: str = ANNOUNCEMENT,
    ) -> None:
        """announcement: what the first signal leads to."""
        self._announcement = announcement
        self.received: str | None = None
        self._begun, self._told = begun, told
        self._since = 0.0
        self._before: dict[int, Any] = {}
        self._watching: threading.Thread | None = None
        self._announcing: threading.Thread | None = None

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._reader, self._writer = socket.socketpair()
            self._writer.setblocking(False)
            self._descriptor = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            for number in received_signals():
                self._before[number] = signal.signal(number, _handle)
                signal.siginterrupt(number, False)  # system calls of native threads go on
            self._watching = threading.Thread(target=self._watch, name="stop signals", daemon=True)
            self._watching.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._before:
            return
        self._since = math.inf  # no second request: the run has ended
        signal.set_wakeup_fd(self._descriptor)
        self._writer.close()  # ends the thread
        if self._watching is not None:
            self._watching.join(ANNOUNCE_SECONDS)
        if self._announcing is not None:  # in a call of the store's when Python ends, it would abort the process
            self._announcing.join(ANNOUNCE_SECONDS)
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before.clear()

    def _watch(self) -> None:
        with self._reader:
            while number := self._reader.recv(1):
                if number[0] in self._before:
                    self._receive(signal.Signals(number[0]))

    def _receive(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if self.received is None:
            if missing := _ended_neighbours():
                _say_ended(missing)
                os._exit(128 + number)
            if not self._begun():
                self._end(number)
            self._since = now
            self._announcing = threading.Thread(
                target=_announce, args=(number, self._announcement), name="stop announcement", daemon=True
            )
            self._announcing.start()
            self.received = number.name
        elif now - self._since > (PRESS_SECONDS if number == signal.SIGINT else REPEAT_SECONDS):
            self._end(number)

    def _end(self, number: signal.Signals) -> None:
        with suppress(Exception):  # a run folder that cannot be read does not keep the process
            self._told()
        os._exit(128 + number)


def _handle(number: int, frame: FrameType | None) -> None:
    """Installed so that Python writes the signal's number to the wakeup descriptor; nothing is left to do."""


def received_signals() -> list[signal.Signals]:
    """Those of SIGNALS that ask this process to stop."""
    return [n for n in SIGNALS if n not in KEPT_IGNORED or signal.getsignal(n) is not signal.SIG_IGN]


def _announce(number: signal.Signals, announcement: str) -> None:
    """Say, once among the ranks that receive it, what the first signal does."""
    name, again = number.name, f"a second one after {REPEAT_SECONDS:.0f} s"
    if number == signal.SIGINT:
        name, again = "Ctrl-C", "a second one"
    text = f"{name}: {announcement}; {again} ends it at once"
    first = os.environ.get("RANK", "0") == "0"
    if first:
        print(text, file=sys.stderr, flush=True)
    from asd_megatron.distributed.first_error import claim_once  # imports torch, which may take seconds

    claim_once("stop_announced", lambda: None if first else print(text, file=sys.stderr, flush=True))


def _ended_neighbours() -> list[int]:
    """The local ranks of this rank's torchrun that do not run any more."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return []
    running = local_ranks(os.getppid())
    if os.getpid() not in running:
        return []
    return sorted(set(range(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))) - set(running.values()))


def _say_ended(local: list[int]) -> None:
    """Say, on one rank and unless one has reported an error, that local ranks have ended; `asd-megatron` says it of its
    own ranks."""
    if launcher_reports(os.environ):
        return
    from asd_megatron.distributed.first_error import report_once

    which = f"local rank {local[0]} has" if len(local) == 1 else f"local ranks {', '.join(map(str, local))} have"
    message = (
        f"{which} ended without a message, so the others end too: torchrun says below by which signal or status"
        " (SIGKILL: most often the system's, when memory ran out). Start the run again with the same command"
    )
    report_once(message, lambda: print(f"error: {message}", file=sys.stderr, flush=True))


def ranks_of(launcher: int) -> list[int]:
    """The processes that `launcher` has started as ranks and that still run; [] without /proc."""
    return list(local_ranks(launcher))


def local_ranks(launcher: int) -> dict[int, int]:
    """`ranks_of` with their local ranks."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError):
            state, parent = (path / "stat").read_bytes().rpartition(b")")[2].split()[:2]
            if int(parent) != launcher or state in (b"Z", b"X"):
                continue
            for word in (path / "environ").read_bytes().split(b"\0"):
                if word.startswith(b"LOCAL_RANK="):
                    found[int(path.name)] = int(word.partition(b"=")[2])
    return found


@contextmanager
def forwarded(processes: Callable[[], list[int]], *, unheard: Callable[[int], None]) -> Iterator[list[int]]:
    """Inside, the signals of `received_signals` are sent on to `processes`, whose end this process then waits for.
    While there are none, `unheard` is called with the signal. After FORCED times Ctrl-C they are killed. Yields the
    signals so far."""
    sent: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        receivers = processes()
        sent.append(number)
        forced = sent.count(signal.SIGINT) >= FORCED
        for process in receivers:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL if forced else number)
        if not receivers:
            unheard(number)

    before = {number: signal.signal(number, forward) for number in received_signals()}
    try:
        yield sent
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

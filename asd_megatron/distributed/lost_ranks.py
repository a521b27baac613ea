"""Ends a rank when another rank's process, its node or the network to it is lost, or when a rank hangs; says which.

A collective notices a process that has died, because its connections are closed, but names it by a port at best. Of a
node that was switched off, or a cut network, it notices nothing until its own time limit, an hour for those of the host
group. So every rank writes a number that counts up, and what it is doing (`activity`), to the job's store once a
second, in a thread. Global rank 0 reads all of them, and so does rank 1, which takes over when rank 0's stands still:

    0, 1     a number has not moved for so many seconds: that rank is lost. Says so in the store and to the user
             ranks have made no progress for the time-out of their phase (`hangs`): the same
    others   the store has not answered for so many seconds, so that rank 0's node is lost; or it says what has happened

Under torchrun and `asd-megatron train` the store is in the launcher. While that one is stopped (Ctrl-Z) nobody can be
watched and nobody is lost; one that hangs ends the ranks, rank 0 too, in the same time.

The main thread of a rank usually waits in a collective that nothing interrupts, so the process is ended, after it has
written its Python stacks to its log. A rank that is busy, or waits, counts on. One that is stopped (SIGSTOP) does not,
nor does one whose interpreter is blocked: the first is continued so that it ends too, the second is ended by a thread
of faulthandler's, which needs no interpreter (another thread puts it off once a second). A lone rank watches its own
progress.
"""

from __future__ import annotations

import itertools
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from asd_megatron.distributed import activity, rank_log
from asd_megatron.distributed.activity import Report
from asd_megatron.distributed.first_error import claimed, connect, report_once
from asd_megatron.distributed.hangs import Hang, HangRule, Limits
from asd_megatron.distributed.launcher import is_stopped
from asd_megatron.distributed.stop_signals import ranks_of
from asd_megatron.errors import UserError

BEAT_SECONDS = 1.0
GONE_BEATS = 3
"""After an error of a collective: a rank that has missed so many beats is its cause."""
CAUSE_SECONDS = 6.0  # in which that shows
LATER_SECONDS = 6.0  # than its time-out, a process whose interpreter is blocked ends
LEAVE_SECONDS = 10.0
"""For the watch to end: in a call of the store's when Python ends, its thread would abort the process."""
AGAIN = "Start the run again with the same command: it continues from its newest checkpoint"
AT_ONCE = timedelta(seconds=60)  # all ranks connect to the store at the same moment
PREFIX = "asd_megatron/alive"
DONE = "done"
_watches = itertools.count()
_current: RankWatch | None = None


class RankLost(UserError):
    """Other ranks are lost; names them."""


class RankWatch:
    """The watch of this rank over a job of `world` ranks. `seconds` without a sign of life: the rank is lost, and `end`
    is called with the message (it ends the process). `limits`: of the phases, for ranks that hang; None: none."""

    def __init__(
        self,
        rank: int,
        world: int,
        seconds: float,
        *,
        limits: Limits | None = None,
        environment: Mapping[str, str] = os.environ,
        end: Callable[[str], None] | None = None,
    ) -> None:
        self.rank, self.world = rank, world
        self._limit = max(1, round(seconds / BEAT_SECONDS))
        self._seconds, self._environment, self._end = seconds, environment, end or self._end_process
        self._limits = limits or {}
        self._rule = HangRule(world, self._limits, BEAT_SECONDS)
        self._groups: Sequence[dist.ProcessGroup] = ()
        self._names = [""] * world
        self._missed = [0] * world  # beats, by rank; on global ranks 0 and 1, which look at the others
        self._silent = 0  # beats for which the store has not answered
        self._lost = ""
        self._reported = False  # by a rank, which knows the cause of what happens to the others
        self._stopping = threading.Event()
        self._key = ""
        self._store: dist.Store | None = None
        self._ended = threading.Lock()
        self._threads: list[threading.Thread] = []

    def start(self, host: dist.ProcessGroup, groups: Sequence[dist.ProcessGroup] = ()) -> None:
        """Begin, once all ranks have. `host`: all ranks, on gloo. `groups`: as for `activity.report`. Collective."""
        global _current
        self._groups = [group for group in groups if group.size() > 1]
        if self.world > 1:
            self._meet(host)
        elif not any(self._limits.values()):
            return
        _current = self
        for action, name in ((self._beat, "rank watch"), (self._count, "rank watch of the store")):
            self._threads.append(threading.Thread(target=action, name=name, daemon=True))
            self._threads[-1].start()

    def _meet(self, host: dist.ProcessGroup) -> None:
        """Connect to the store, and learn the ranks' names."""
        self._store = connect(self._environment, AT_ONCE)
        if self._store is None:
            where = ":".join(self._environment.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
            raise UserError(
                f"the ranks' store at {where} does not answer rank {self.rank}: check the network to that node,"
                " and start the run again"
            )
        attempt = self._environment.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._key = f"{PREFIX}/{attempt}/{next(_watches)}"
        self._store.set(self._own, "0")
        dist.all_gather_object(self._names, _name(self._environment), group=host)

    def stop(self) -> None:
        """End the watch: this rank is not missed from now on."""
        global _current
        if _current is self:
            _current = None
        self._stopping.set()
        for thread in self._threads:
            thread.join(LEAVE_SECONDS)  # longer than a beat only if the store does not answer
        self._threads.clear()

    def cause(self, seconds: float = CAUSE_SECONDS) -> str:
        """Who is gone, after a collective has failed: as soon as it shows, and "" if it does not within `seconds`, or
        another rank has already reported what it was."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self._stopping.is_set():
            gone = [rank for rank, missed in enumerate(self._missed) if missed >= GONE_BEATS]
            if self._lost or gone:
                return (
                    self._lost or f"{self._text(gone)}: the process has died, or its node or network is lost. {AGAIN}"
                )
            if self._silent >= GONE_BEATS:
                return self._silent_text(f"{self._silent * BEAT_SECONDS:.0f} s")
            if self._reported:
                return ""
            time.sleep(BEAT_SECONDS / 4)
        return ""

    @property
    def _own(self) -> str:
        return f"{self._key}/{self.rank}"

    def _text(self, ranks: Sequence[int]) -> str:
        """`rank 1 on node2 (10.0.0.2) is gone`; of many the first four, by host."""
        return f"{self._named(ranks)} {'is' if len(ranks) == 1 else 'are'} gone"

    def _named(self, ranks: Sequence[int]) -> str:
        named = [f"rank {rank} on {self._names[rank]}" for rank in ranks[:4]]
        more = f" and {len(ranks) - 4} more" if len(ranks) > 4 else ""
        return f"{', '.join(named)}{more}"

    def _beat(self) -> None:
        """Count up, and look at the others. A store that fails is tried again until `_count` gives it up."""
        store, seen = self._store, dict[int, bytes]()
        for count in itertools.count(1):
            stopping = self._stopping.wait(BEAT_SECONDS)
            own = activity.report(self._groups)
            if self.world == 1:
                if stopping:
                    return
                self._judge([own])
                continue
            try:
                if store is not None and stopping:
                    store.set(f"{self._own}/{DONE}", "")
                if stopping:
                    return
                if store is None:
                    store = connect(self._environment)
                if store is None:
                    continue
                store.set(self._own, f"{count} {own.to_text()}")
                self._reported = claimed(store, self._environment)
                self._silent = 0
                if store.check([f"{self._key}/lost"]):
                    self._lost = store.get(f"{self._key}/lost").decode()
                    self._finish(self._lost)
                elif self.rank < 2:
                    self._look(store, own, seen)
            except RuntimeError:
                store = None

    def _end_if_blocked(self) -> None:
        """This process ends, its stacks written, when this is not called again: its interpreter is blocked. A little
        later than the others give it up, because its end would be the first that a launcher sees."""
        log = rank_log.current()
        limits = [self._limits.get(activity.phase()), self._seconds if self.world > 1 else None]
        bounds = [limit for limit in limits if limit is not None]
        if log is not None and bounds:
            log.end_after(min(bounds) + LATER_SECONDS, on_console=self.world == 1)

    def _look(self, store: dist.Store, own: Report, seen: dict[int, bytes]) -> None:
        """On global ranks 0 and 1: who has not counted up, and who hangs; rank 1 acts when rank 0 does not. Beats are
        counted, not seconds: a pause of this process, or of all, is nobody's loss."""
        others = [rank for rank in range(self.world) if rank != self.rank]
        reports: list[Report | None] = [own] * self.world
        for rank, number in zip(others, store.multi_get([f"{self._key}/{rank}" for rank in others]), strict=True):
            self._missed[rank] = self._missed[rank] + 1 if seen.get(rank) == number else 0
            seen[rank] = number
            reports[rank] = Report.from_text(number.decode().partition(" ")[2])
        late = [rank for rank in others if self._missed[rank] >= GONE_BEATS]
        left = [rank for rank in late if store.check([f"{self._key}/{rank}/{DONE}"])]
        for rank in left:
            self._missed[rank] = 0
        if self.rank and self._missed[0] < GONE_BEATS:
            return
        lost = [rank for rank in others if self._missed[rank] >= self._limit]
        if lost:
            self._give_up(
                f"{self._text(lost)}: no sign of life for {self._seconds:.0f} s (run.lost_rank_timeout), so the process"
                f" hangs, or its node or network is lost. {self._last(lost, reports)}{AGAIN}",
                store,
            )
        elif not left and all(report is not None for report in reports):
            self._judge([report for report in reports if report is not None], store)

    def _judge(self, reports: Sequence[Report], store: dist.Store | None = None) -> None:
        """End the run if ranks hang."""
        hang = self._rule.look(reports)
        if hang is not None:
            self._give_up(f"{self._hang_text(hang, reports)} {AGAIN}", store)

    def _give_up(self, message: str, store: dist.Store | None) -> None:
        self._lost = message
        if store is not None:
            store.set(f"{self._key}/lost", message)
        self._finish(message)

    def _hang_text(self, hang: Hang, reports: Sequence[Report]) -> str:
        """What a hang's message says."""
        first = hang.ranks[0]
        who = self._named(hang.ranks) if self.world > 1 else "the run"
        verb = "hangs" if len(hang.ranks) == 1 else "hang"
        silent = self._missed[first] >= GONE_BEATS
        why = ", and its process gives no sign of life (stopped, or blocked)" if silent else ""
        others = "" if self.world == len(hang.ranks) else "; the other ranks wait"
        return (
            f"{who} {verb}: no progress for {hang.seconds:.0f} s in the phase {hang.phase}"
            f" (run.timeout.{hang.phase}){why}{others}. {self._last(hang.ranks, reports)}"
        ).rstrip()

    def _last(self, ranks: Sequence[int], reports: Sequence[Report | None]) -> str:
        """The last operation of the first of `ranks`, and where stacks are."""
        report, log = reports[ranks[0]], rank_log.current()
        operation = "" if report is None else f"Last operation, in the phase {report.phase}: {report.operation}. "
        return operation + (
            "" if log is None else f"Its Python stacks, and beside them the others': {log.path(ranks[0])}. "
        )

    def _count(self) -> None:
        """That this process's interpreter runs; and for how long the store, in the launcher or on rank 0's node, has
        not answered. (An operation on it has no time limit of its own.)"""
        while not self._stopping.wait(BEAT_SECONDS):
            self._end_if_blocked()
            if self.world == 1 or self._launched and is_stopped(os.getppid()):
                continue
            self._silent += 1
            if self._silent >= self._limit:
                self._lost = self._silent_text(f"{self._seconds:.0f} s (run.lost_rank_timeout)")
                self._finish(self._lost)
                return

    @property
    def _launched(self) -> bool:
        """Whether the parent is torchrun's launcher."""
        return "TORCHELASTIC_RUN_ID" in self._environment

    def _silent_text(self, since: str) -> str:
        """What the message about a silent store says: the first node's launcher has it, or rank 0. since: how long."""
        if self._launched and self._environment.get("GROUP_RANK", "0") == "0":
            launcher = f"the launcher (process {os.getppid()}), which has the ranks' store,"
            return f"{launcher} has not answered for {since}. {AGAIN}"
        return (
            f"rank 0 on {self._names[0]} is gone: its node has not answered rank {self.rank} on"
            f" {self._names[self.rank]} for {since}, so that node or the network to it is lost. {AGAIN}"
        )

    def _finish(self, message: str) -> None:
        if self._ended.acquire(blocking=False) and not self._stopping.is_set():
            self._end(message)

    def _end_process(self, message: str) -> None:
        """Write this rank's stacks to its log, say the message, once for the ranks that still reach one another and
        once on each node that does not, and end this process."""
        log = rank_log.current()
        if log is not None:
            log.stacks(message)
        if self.world > 1 and self._launched:
            for process in ranks_of(os.getppid()):  # one that is stopped ends too
                with suppress(OSError):
                    os.kill(process, signal.SIGCONT)
        if self.world == 1:
            _say(message)
        elif self._silent >= GONE_BEATS:
            if self._environment.get("LOCAL_RANK", "0") == "0":
                _say(message)
        elif self.rank < 2:
            report_once(message, lambda: _say(message), self._environment)
            time.sleep(2 * BEAT_SECONDS)  # the store may end with this process: the others read it first
        os._exit(1)


def lost_ranks(error: BaseException) -> RankLost | None:
    """Which lost ranks are the cause of `error`, if it is a collective's; None: none that this rank knows of. Waits
    some seconds for it to show."""
    broken = isinstance(error, dist.DistBackendError) or isinstance(error, RuntimeError) and "gloo/" in str(error)
    if not broken or _current is None:
        return None
    cause = _current.cause()
    return RankLost(cause) if cause else None


def _name(environment: Mapping[str, str]) -> str:
    """This rank's node: its host name, and its address towards rank 0's."""
    name = socket.gethostname()
    with suppress(OSError, KeyError):
        family, _, _, _, where = socket.getaddrinfo(environment["MASTER_ADDR"], 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(where)  # sends nothing
            return f"{name} ({probe.getsockname()[0]})"
    return name


def _say(message: str) -> None:
    with suppress(OSError):
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"error: {message}\n".encode())

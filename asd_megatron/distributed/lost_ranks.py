"""Ends a rank when another rank's process, its node or the network to it is lost, and says which.

A collective notices a process that has died, because its connections are closed, but names it by a port at best. Of a
node that was switched off, or a cut network, it notices nothing until its own time limit, an hour for those of the host
group. So every rank counts up a number of its own in the job's store once a second, in a thread, and global rank 0
reads all of them:

    rank 0   a number has not moved for so many seconds: that rank is lost. Says so in the store and to the user
    others   the store has not answered for so many seconds, so that rank 0's node is lost; or it says who is

The main thread of a rank usually waits in a collective that nothing interrupts, so the process is ended. A rank that is
busy, or waits, counts on; one that is stopped (SIGSTOP), or whose interpreter is blocked, does not.
"""

from __future__ import annotations

import itertools
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from asd_megatron.distributed.first_error import claimed, connect, report_once
from asd_megatron.errors import UserError

BEAT_SECONDS = 1.0
GONE_BEATS = 3
"""After an error of a collective: a rank that has missed so many beats is its cause."""
CAUSE_SECONDS = 6.0  # in which that shows
AGAIN = "Start the run again with the same command: it continues from its newest checkpoint"
AT_ONCE = timedelta(seconds=60)  # all ranks connect to the store at the same moment
PREFIX = "asd_megatron/alive"
DONE = "done"
_watches = itertools.count()
_current: RankWatch | None = None


class RankLost(UserError):
    """Other ranks are lost; names them."""


class RankWatch:
    """The watch of this rank over a job of `world` ranks; does nothing for one. `seconds` without a sign of life: the
    rank is lost, and `end` is called with the message (it ends the process)."""

    def __init__(
        self,
        rank: int,
        world: int,
        seconds: float,
        *,
        environment: Mapping[str, str] = os.environ,
        end: Callable[[str], None] | None = None,
    ) -> None:
        self.rank, self.world = rank, world
        self._limit = max(1, round(seconds / BEAT_SECONDS))
        self._seconds, self._environment, self._end = seconds, environment, end or self._end_process
        self._names: list[str] = []
        self._missed = [0] * world  # beats, by rank; on other ranks than 0 of rank 0, whose node has the store, alone
        self._lost = ""
        self._reported = False  # by a rank, which knows the cause of what happens to the others
        self._stopping = threading.Event()
        self._key = ""
        self._store: dist.Store | None = None
        self._ended = threading.Lock()
        self._beating: threading.Thread | None = None

    def start(self, host: dist.ProcessGroup) -> None:
        """Begin, once all ranks have. `host`: all ranks, on gloo. Collective."""
        global _current
        if self.world == 1:
            return
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
        self._names = [""] * self.world
        dist.all_gather_object(self._names, _name(self._environment), group=host)
        _current = self
        self._beating = threading.Thread(target=self._beat, name="rank watch", daemon=True)
        self._beating.start()
        if self.rank:
            threading.Thread(target=self._count, name="rank watch of the store", daemon=True).start()

    def stop(self) -> None:
        """End the watch: this rank is not missed from now on."""
        global _current
        if _current is self:
            _current = None
        self._stopping.set()
        if self._beating is not None:
            self._beating.join(2 * BEAT_SECONDS)  # longer only if the store does not answer
            self._beating = None

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
            if self._reported:
                return ""
            time.sleep(BEAT_SECONDS / 4)
        return ""

    @property
    def _own(self) -> str:
        return f"{self._key}/{self.rank}"

    def _text(self, ranks: list[int]) -> str:
        """`rank 1 on node2 (10.0.0.2) is gone`; of many the first four, by host."""
        named = [f"rank {rank} on {self._names[rank]}" for rank in ranks[:4]]
        more = f" and {len(ranks) - 4} more" if len(ranks) > 4 else ""
        return f"{', '.join(named)}{more} {'is' if len(ranks) == 1 else 'are'} gone"

    def _beat(self) -> None:
        """Count up, and look at the others. A store that fails is tried again until `_count` gives it up."""
        store, others = self._store, [rank for rank in range(self.world) if rank != self.rank]
        seen: dict[int, bytes] = {}
        for count in itertools.count(1):
            stopping = self._stopping.wait(BEAT_SECONDS)
            try:
                if store is not None and stopping:
                    store.set(f"{self._own}/{DONE}", "")
                if stopping:
                    return
                if store is None:
                    store = connect(self._environment)
                if store is None:
                    continue
                store.set(self._own, str(count))
                self._reported = claimed(store, self._environment)
                if self.rank == 0:
                    self._look(store, others, seen)
                elif store.check([f"{self._key}/lost"]):
                    self._lost = store.get(f"{self._key}/lost").decode()
                    self._finish(self._lost)
                else:
                    self._missed[0] = 0
            except RuntimeError:
                store = None

    def _look(self, store: dist.Store, others: list[int], seen: dict[int, bytes]) -> None:
        """On global rank 0: who has not counted up. Beats are counted, not seconds: a pause of this process, or of
        all, is nobody's loss."""
        for rank, number in zip(others, store.multi_get([f"{self._key}/{rank}" for rank in others]), strict=True):
            self._missed[rank] = self._missed[rank] + 1 if seen.get(rank) == number else 0
            seen[rank] = number
        late = [rank for rank in others if self._missed[rank] >= GONE_BEATS]
        for rank in late:
            if store.check([f"{self._key}/{rank}/{DONE}"]):
                self._missed[rank] = 0
        lost = [rank for rank in others if self._missed[rank] >= self._limit]
        if lost:
            self._lost = (
                f"{self._text(lost)}: no sign of life for {self._seconds:.0f} s (run.lost_rank_timeout), so the process"
                f" hangs, or its node or network is lost. {AGAIN}"
            )
            store.set(f"{self._key}/lost", self._lost)
            self._finish(self._lost)

    def _count(self) -> None:
        """On the other ranks: how long the store, on rank 0's node, has not answered. (An operation on it has no time
        limit of its own.)"""
        while not self._stopping.wait(BEAT_SECONDS):
            self._missed[0] += 1
            if self._missed[0] >= self._limit:
                self._lost = (
                    f"rank 0 on {self._names[0]} is gone: its node has not answered rank {self.rank} on"
                    f" {self._names[self.rank]} for {self._seconds:.0f} s (run.lost_rank_timeout), so that node or the"
                    f" network to it is lost. {AGAIN}"
                )
                self._finish(self._lost)
                return

    def _finish(self, message: str) -> None:
        if self._ended.acquire(blocking=False) and not self._stopping.is_set():
            self._end(message)

    def _end_process(self, message: str) -> None:
        """Say it, once for the ranks that still reach one another and once on each node that does not, and end this
        process."""
        if self.rank == 0:
            report_once(message, lambda: _say(message), self._environment)
            time.sleep(2 * BEAT_SECONDS)  # the store may end with this process: the others read it first
        elif self._missed[0] and self._environment.get("LOCAL_RANK", "0") == "0":
            _say(message)
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

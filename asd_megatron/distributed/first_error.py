"""Chooses which of several failing ranks reports its error: the first one, global rank 0 by preference.

Most errors reach all ranks, either because each of them refuses the same thing, or because one rank fails and the
others' collectives break. The ranks agree through the job's TCPStore, which needs no collective.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

HEAD_START = 2.0
"""Seconds that a rank other than 0 leaves rank 0 to report first."""
REPORT_SECONDS = 5.0  # for the rank that reports
CONNECT = timedelta(seconds=5)
POLL_SECONDS = 0.05
CLAIMED, REPORTED = "asd_megatron/first_error", "asd_megatron/first_error_reported"


def report_once(message: str, report: Callable[[], None], environment: Mapping[str, str] = os.environ) -> str | None:
    """Call `report` if this rank is the one to report, and return None; else return the message that another rank
    reports, after it has done so (waits for some seconds at most).

    Where the ranks cannot be asked (no torchrun, and not joined yet) every rank reports, rank 0 first.
    """
    rank = int(environment.get("RANK", "0"))
    store = connect(environment)
    if store is None:
        if rank:
            time.sleep(HEAD_START)
        report()
        return None
    reported = _key(REPORTED, environment)
    first_rank, first_message = _claim(store, _key(CLAIMED, environment), rank, message)
    if first_rank == rank:
        report()
        with suppress(RuntimeError):
            store.set(reported, "yes")
        return None
    _wait(store, reported, REPORT_SECONDS)
    return first_message


def claim_once(name: str, action: Callable[[], None], environment: Mapping[str, str] = os.environ) -> None:
    """Call `action` on one of the ranks that come here: on rank 0 if it does so within HEAD_START seconds, else on the
    first of the others. Where the ranks cannot be asked, on rank 0 alone."""
    rank, key = int(environment.get("RANK", "0")), _key(f"asd_megatron/{name}", environment)
    if rank == 0:
        action()
    alone = int(environment.get("WORLD_SIZE", "1")) == 1
    store = None if alone else connect(environment)
    if store is None:
        return
    if rank:
        _wait(store, key, HEAD_START)
    with suppress(RuntimeError):
        first = store.compare_set(key, "", str(rank)).decode()
        if rank and first == str(rank):
            action()


def claimed(store: dist.Store, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a rank has claimed to report its error."""
    return bool(store.check([_key(CLAIMED, environment)]))


def _key(name: str, environment: Mapping[str, str]) -> str:
    return f"{name}/{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _claim(store: dist.Store, key: str, rank: int, message: str) -> tuple[int, str]:
    """The rank that failed first, and its message: this one's unless another was quicker."""
    if rank:
        _wait(store, key, HEAD_START)
    try:
        claim = store.compare_set(key, "", f"{rank} {message}").decode()
    except RuntimeError:  # the host of the store has ended
        return rank, message
    first_rank, _, first_message = claim.partition(" ")
    return int(first_rank), first_message


def _wait(store: dist.Store, key: str, seconds: float) -> None:
    """Until `key` is set, for some seconds at most. (`Store.wait` prints a warning of several lines when it is not.)"""
    deadline = time.monotonic() + seconds
    with suppress(RuntimeError):  # the host of the store, rank 0 or the launcher, has ended
        while not store.check([key]) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)


def connect(environment: Mapping[str, str], timeout: timedelta = CONNECT) -> dist.Store | None:
    """A connection of its own to the job's store: the process groups' may be blocked in a collective. None: the ranks
    have none, or it does not answer."""
    if not (dist.is_initialized() or environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"):
        return None
    if "MASTER_ADDR" not in environment or "MASTER_PORT" not in environment:
        return None
    address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    try:
        # A store whose process has ended refuses at once; TCPStore would try again until the time limit, and print a
        # stack trace.
        socket.create_connection((address, port), timeout.total_seconds()).close()
        return dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timeout)
    except (OSError, RuntimeError):
        return None

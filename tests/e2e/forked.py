"""Ranks of a training program as forks of one process that has imported it: a case takes a second or two, in place of
the ten that new interpreters take."""

from __future__ import annotations

import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

LIMIT = 20.0  # seconds from a failure to the end of all ranks; a hang would take an hour


def prepare() -> None:
    """Import what ranks need; in the process that will fork them."""
    import torch

    from asd_megatron import train  # noqa: F401
    from asd_megatron.distributed import device

    torch.set_num_threads(1)
    device.prepare()


def fork_ranks(
    arguments: list[str], output: Path, ranks: int, before: Callable[[int], None] = lambda rank: None
) -> list[int]:
    """Start `ranks` of `asd_megatron.train` that print to `output`, each after `before(rank)`; their process ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [_fork(lambda rank=rank: _rank(rank, ranks, arguments, output, port, before)) for rank in range(ranks)]


def wait(pids: list[int]) -> list[int]:
    """The exit statuses of processes, once all have ended; when one has, the others get SIGTERM if it has failed, as
    from torchrun."""
    statuses: dict[int, int] = {}
    while len(statuses) < len(pids):
        pid, status = os.wait()
        statuses[pid] = os.waitstatus_to_exitcode(status)
        for other in set(pids) - set(statuses):
            if statuses[pid]:
                os.kill(other, signal.SIGTERM)
    return [statuses[pid] for pid in pids]


def _fork(program: Callable[[], None]) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        program()
    finally:
        os._exit(99)


def _rank(rank: int, ranks: int, arguments: list[str], output: Path, port: int, before: Callable[[int], None]) -> None:
    from asd_megatron import train

    out = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    signal.alarm(int(2 * LIMIT))  # for a rank that hangs
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a shell's foreground, without nohup
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    before(rank)
    try:
        status = train.main(arguments)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)

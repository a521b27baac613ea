"""Run a function on several gloo ranks, bounded in time.

def _body(rank: int, x: float) -> float:            # module level, so that another process can import it
    t = torch.tensor([x]); dist.all_reduce(t); return t.item()

def test_sum():
    assert run_ranks(_body, 2, 1.5) == [3.0, 3.0]
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.forkserver import ensure_running
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PRELOADED = ["tests.distributed.preload"]
GRACE_SECONDS = 2.0  # for the first failing rank to finish writing its traceback


class RankError(RuntimeError):
    """A rank raised, died or did not finish in time; the message carries the first traceback."""


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 120,
    init: bool = True,
    fresh: bool = False,
    context: Any = None,
) -> list[Any]:
    """Call `fn(rank, *args)` on `world_size` new processes; return the results by rank.

    `fn`, `args` and the results are pickled; `fn` must be importable (module level). Each rank has the variables of
    torchrun (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), one thread, and, with `init`, a gloo world group.
    `fresh`: ranks import everything themselves, under the environment as it is, which takes seconds. `context`: of
    multiprocessing, in place of the server's or a fresh one.
    Raises RankError with the traceback of the first rank that failed, or when `timeout` seconds have passed.
    """
    # The parent hosts the store, so the port is free by construction.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory(prefix="ranks_") as folder:
        context = context or (multiprocessing.get_context("spawn") if fresh else forkserver())
        environment = dict(os.environ)
        processes: list[BaseProcess] = [
            context.Process(
                target=_rank, args=(fn, rank, world_size, store.port, args, folder, timeout, init, environment)
            )
            for rank in range(world_size)
        ]
        try:
            for process in processes:
                process.start()
            _join(processes, timeout, Path(folder))
            return [pickle.loads((Path(folder) / f"{rank}.result").read_bytes()) for rank in range(world_size)]
        finally:
            _kill(processes)


def _join(processes: list[BaseProcess], timeout: float, folder: Path) -> None:
    deadline = time.monotonic() + timeout
    while alive := [process for process in processes if process.exitcode is None]:
        left = deadline - time.monotonic()
        if left <= 0:
            raise RankError(f"{len(alive)} of {len(processes)} ranks did not finish in {timeout} s{_failures(folder)}")
        wait([process.sentinel for process in alive], timeout=left)
        if any(process.exitcode for process in processes):
            break
    if any(process.exitcode for process in processes):
        end = time.monotonic() + GRACE_SECONDS
        while not list(folder.glob("*.failure")) and time.monotonic() < end:
            time.sleep(0.05)
        codes = [process.exitcode for process in processes]
        raise RankError(f"ranks ended with exit codes {codes}{_failures(folder)}")


def _failures(folder: Path) -> str:
    """The traceback of the rank that failed first (the others usually fail because of it)."""
    failures = []
    for path in folder.glob("*.failure"):
        with contextlib.suppress(pickle.UnpicklingError, EOFError):
            failures.append((*pickle.loads(path.read_bytes()), path.stem))
    if not failures:
        return ""
    _, text, rank = min(failures)
    return f"; rank {rank} failed first:\n{text}"


@functools.cache
def forkserver() -> Any:
    """Forks ranks from a server process that has imported what they need: importing takes seconds, a fork none.

    Nothing imported there may start threads or a process group; the server has one OpenMP thread.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    start_server(ensure_running)
    return context


def start_server(start: Callable[[], None]) -> None:
    """`start` a fork server with one OpenMP thread."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # counts only when set before torch is imported
    try:
        start()
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _kill(processes: list[BaseProcess]) -> None:
    for process in processes:
        if process.pid is None:
            continue
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # each rank leads its own group: this reaches its helpers too
        if process.exitcode is None:
            process.kill()
        process.join()


def _rank(
    fn: Callable[..., Any],
    rank: int,
    world_size: int,
    port: int,
    args: tuple[Any, ...],
    folder: str,
    timeout: float,
    init: bool,
    environment: dict[str, str],
) -> None:
    os.setsid()
    os.environ.clear()  # the server's, from when it started
    os.environ.update(environment, OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",  # env:// connects to the parent's store instead of hosting one
    )
    try:
        if init:
            dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
        result = fn(rank, *args)
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
        (Path(folder) / f"{rank}.result").write_bytes(pickle.dumps(result))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # a normal exit may abort in the destructor of a group that something still refers to
    except BaseException:
        failed = time.time()
        (Path(folder) / f"{rank}.failure").write_bytes(pickle.dumps((failed, traceback.format_exc())))
        os._exit(1)  # a normal exit could wait for the other ranks

"""A rank that gives no sign of life is named by the others, soon after a collective broke and at the latest after the
time limit; one that has left, or is only busy, is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from asd_megatron.distributed import activity, lost_ranks
from asd_megatron.distributed.lost_ranks import RankWatch
from asd_megatron.distributed.objects import meet
from tests.distributed.harness import run_ranks

BEAT = 0.2
LIMIT = 2.0  # seconds of the watch: 10 beats
SECONDS = 30.0
BROKEN = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.2]:1234")


def _until(condition: Any) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _watch(rank: int) -> tuple[RankWatch, list[str]]:
    lost_ranks.BEAT_SECONDS = BEAT
    ends: list[str] = []
    watch = RankWatch(rank, dist.get_world_size(), LIMIT, environment=os.environ | {"RANK": str(rank)}, end=ends.append)
    watch._limit = round(LIMIT / BEAT)
    assert dist.group.WORLD is not None
    watch.start(dist.group.WORLD)
    return watch, ends


def _one_stops(rank: int) -> tuple[str, str, list[str]]:
    """Rank 2 is stopped, for longer than the limit; what the others say of a broken collective, then at the limit."""
    watch, ends = _watch(rank)
    dist.barrier()
    if rank == 2:
        seconds = LIMIT + 3.0
        subprocess.run(["sh", "-c", f"(kill -STOP {os.getpid()}; sleep {seconds}; kill -CONT {os.getpid()}) & wait $!"])
        _until(lambda: ends)  # it reads that it was given up
        return "", "", ends
    unrelated = str(lost_ranks.lost_ranks(ValueError("no such file")) or "")
    cause = str(lost_ranks.lost_ranks(BROKEN) or "")
    _until(lambda: ends)
    time.sleep(5.0 if rank == 0 else 0.0)  # the store, for rank 2
    watch.stop()
    return unrelated, cause, ends


def test_a_rank_that_stops_is_named() -> None:
    first, second, third = run_ranks(_one_stops, 3)
    assert first[0] == second[0] == ""
    assert first[1].startswith("rank 2 on ") and "is gone: the process has died" in first[1]
    assert len(first[2]) == len(second[2]) == 1 and first[2] == second[2] == third[2]
    assert first[2][0].startswith("rank 2 on ") and "no sign of life for 2 s (run.lost_rank_timeout)" in first[2][0]


def _rank_zero_stops(rank: int, store_port: int) -> list[str]:
    """Global rank 0, which looks at the others, is stopped; the store is in another process, as torchrun's."""
    os.environ["MASTER_PORT"] = str(store_port)
    watch, ends = _watch(rank)
    dist.barrier()
    if rank == 0:
        time.sleep(3 * BEAT)  # it has been seen
        subprocess.run(["sh", "-c", f"(kill -STOP {os.getpid()}; sleep 4; kill -CONT {os.getpid()}) & wait $!"])
    _until(lambda: ends)
    watch.stop()
    return ends


def test_rank_1_looks_when_rank_0_does_not() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    first, second, third = run_ranks(_rank_zero_stops, 3, store.port)
    assert first == second == third and len(first) == 1
    assert first[0].startswith("rank 0 on ") and "no sign of life for 2 s (run.lost_rank_timeout)" in first[0]


def _one_hangs(rank: int) -> list[str]:
    """Rank 1 does not come to the barrier in which the others are; rank 2 is only late before that."""
    activity.restart()
    lost_ranks.BEAT_SECONDS = BEAT
    ends: list[str] = []
    watch = RankWatch(rank, 3, 60.0, limits={"update": 1.0}, environment=os.environ, end=ends.append)
    assert dist.group.WORLD is not None
    watch.start(dist.group.WORLD)
    activity.enter("update")
    for _ in range(10 * (rank == 2)):
        activity.mark()
        time.sleep(0.2)
    if rank == 1:
        _until(lambda: ends)
    meet(dist.group.WORLD)
    _until(lambda: ends)
    time.sleep(2.0 if rank == 0 else 0.0)  # the store, for the others
    watch.stop()
    return ends


def test_a_rank_that_hangs_is_named_with_its_call() -> None:
    first, second, third = run_ranks(_one_hangs, 3)
    assert first == second == third and len(first) == 1
    assert first[0].startswith("rank 1 on ") and "hangs: no progress for 1 s in the phase update" in first[0]
    assert "Last operation, in the phase update: _until (" in first[0], first


def _leaves_early(rank: int) -> list[str]:
    watch, ends = _watch(rank)
    dist.barrier()
    if rank:
        watch.stop()
    time.sleep(LIMIT + 1.0)
    watch.stop()
    return ends


def test_a_rank_that_has_left_is_not_missed() -> None:
    assert run_ranks(_leaves_early, 2) == [[], []]


def _store_ends(rank: int, store_port: int) -> list[str]:
    """Rank 0's node, with the store, does not answer."""
    os.environ["MASTER_PORT"] = str(store_port)
    watch, ends = _watch(rank)
    dist.barrier()
    if rank == 1:
        _until(lambda: ends)
    watch.stop()
    return ends


def _launcher_stops(rank: int, store_port: int) -> tuple[int, list[str]]:
    """The store is in the launcher, which is stopped for longer than the limit, and then hangs. How many messages there
    were meanwhile; all."""
    os.environ["MASTER_PORT"] = str(store_port)
    os.environ["TORCHELASTIC_RUN_ID"] = "of a launcher"
    stopped = [True]
    lost_ranks.is_stopped = lambda process: stopped[0]
    watch, ends = _watch(rank)
    dist.barrier()
    time.sleep(LIMIT + 2.0)
    before, stopped[0] = len(ends), False
    _until(lambda: ends)
    watch.stop()
    return before, ends


def _with_stopped_store(ranks: Callable[..., Any], keys: int) -> list[Any]:
    """Run `ranks` with a store in another process, which is stopped once it has `keys`: connections stay, and nothing
    answers."""
    program = (
        "import time, torch.distributed as d\n"
        "s = d.TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)\n"
        "print(s.port, flush=True)\n"
        f"while s.num_keys() < {keys}: time.sleep(0.05)\n"
        "time.sleep(1.0); print('used', flush=True); time.sleep(100)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as store:
        assert store.stdout is not None
        port = int(store.stdout.readline())

        def stop() -> None:
            assert store.stdout is not None
            store.stdout.readline()
            store.send_signal(signal.SIGSTOP)

        thread = threading.Thread(target=stop)
        thread.start()
        try:
            return run_ranks(ranks, 2, port)
        finally:
            store.kill()
            thread.join()


def test_a_store_that_is_gone_is_rank_0s_loss() -> None:
    found = _with_stopped_store(_store_ends, 3)
    assert found[0] == [] and len(found[1]) == 1
    assert found[1][0].startswith("rank 0 on ") and "has not answered rank 1 on" in found[1][0]


def test_a_stopped_launcher_is_nobodys_loss_and_one_that_hangs_ends_the_ranks() -> None:
    for before, ends in _with_stopped_store(_launcher_stops, 2):
        assert before == 0 and len(ends) == 1
        assert ends[0].startswith("the launcher (process ") and "has not answered for 2 s" in ends[0]

"""The rank harness itself: results by rank, the first traceback, the time bound."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed.harness import RankError, run_ranks


def _sum(rank: int, x: float) -> tuple[int, float, str]:
    total = torch.tensor([x + rank])
    dist.all_reduce(total)
    return rank, total.item(), os.environ["OMP_NUM_THREADS"]


def _fail(rank: int) -> None:
    if rank == 1:
        raise ValueError("boom on rank one")
    dist.barrier()


def _hang(rank: int) -> None:
    if rank == 0:
        time.sleep(60)


def test_results_come_back_by_rank() -> None:
    assert run_ranks(_sum, 2, 1.5) == [(0, 4.0, "1"), (1, 4.0, "1")]


def test_the_first_traceback_is_reported() -> None:
    with pytest.raises(RankError, match="boom on rank one"):
        run_ranks(_fail, 2)


def test_time_is_bounded() -> None:
    start = time.monotonic()
    with pytest.raises(RankError, match="did not finish in 3"):
        run_ranks(_hang, 2, timeout=3)
    assert time.monotonic() - start < 30

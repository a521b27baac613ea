"""Process groups of a layout: who shares what with whom."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch.distributed as dist

from asd_megatron.distributed.layout import Layout, init, shutdown
from asd_megatron.errors import UserError
from tests.distributed.harness import run_ranks


def _members(rank: int, layouts: list[Layout]) -> list[dict[str, list[int]]]:
    """The global ranks of this rank's groups, for one layout after the other."""
    found, threads = [], []
    for layout in layouts:
        process_groups = init(layout, host_minutes=0.5)  # under a minute: rounded up where Megatron counts whole ones
        ranks = {n: dist.get_process_group_ranks(g) for n, g in vars(process_groups).items()}
        assert ranks.pop("host") == ranks["world"] and dist.get_backend(process_groups.host) == "gloo"
        found.append(ranks)
        threads.append(len(os.listdir("/proc/self/task")))
    assert max(threads) < threads[0] + 20, threads  # the earlier layouts' groups are gone, and gloo's threads with them
    with pytest.raises(UserError, match="needs 8 ranks and there are 4.*parallelism section"):
        init(Layout(data=8))
    shutdown()
    shutdown()
    assert not dist.is_initialized()
    return found


def test_groups_of_four_ranks() -> None:
    layouts = [
        Layout(tensor=2, pipeline=2),
        Layout(context=2, data=2),
        Layout(tensor=2, data=2, sequence_parallel=True),
        Layout(pipeline=2, virtual_pipeline=2, context=2),
        Layout(tensor=2, data=2, sequence_parallel=True, expert=4),
        Layout(data=2, pipeline=2, expert=2),
    ]
    by_rank = run_ranks(_members, 4, layouts, init=False)
    first, last = by_rank[0], by_rank[3]
    everyone = [0, 1, 2, 3]
    assert [ranks.pop("ep") for ranks in first] == [[0], [0], [0], [0], everyone, [0, 1]]
    assert [ranks.pop("ep") for ranks in last] == [[3], [3], [3], [3], everyone, [2, 3]]
    assert first[0] == {"tp": [0, 1], "pp": [0, 2], "cp": [0], "dp": [0], "dp_cp": [0], "world": everyone}
    assert last[0] == {"tp": [2, 3], "pp": [1, 3], "cp": [3], "dp": [3], "dp_cp": [3], "world": everyone}
    assert first[1] == {"tp": [0], "pp": [0], "cp": [0, 1], "dp": [0, 2], "dp_cp": everyone, "world": everyone}
    assert last[1] == {"tp": [3], "pp": [3], "cp": [2, 3], "dp": [1, 3], "dp_cp": everyone, "world": everyone}
    assert first[2] == {"tp": [0, 1], "pp": [0], "cp": [0], "dp": [0, 2], "dp_cp": [0, 2], "world": everyone}
    assert last[3] == {"tp": [3], "pp": [1, 3], "cp": [2, 3], "dp": [3], "dp_cp": [2, 3], "world": everyone}


def _alone(rank: int) -> int:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):  # as in a plain `python` process
        del os.environ[name]
    size = init(Layout()).world.size()
    shutdown()
    return size


def test_one_process_needs_no_launcher() -> None:
    assert run_ranks(_alone, 1, init=False) == [1]


def test_world_size() -> None:
    assert Layout(tensor=2, pipeline=3, virtual_pipeline=2, context=5, data=7).world_size == 210


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tensor": 0}, "at least 1"),
        ({"data": -1}, "at least 1"),
        ({"expert": 0}, "at least 1"),
        ({"tensor": 2, "pipeline": 2, "expert": 4}, "parallelism.expert"),
        ({"virtual_pipeline": 2}, "parallelism.pipeline"),
        ({"pipeline": 2, "virtual_pipeline": 1}, "parallelism.virtual_pipeline"),
        ({"sequence_parallel": True}, "parallelism.tensor"),
    ],
)
def test_impossible_layouts(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Layout(**sizes)

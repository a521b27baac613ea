"""Process groups of a layout: who shares what with whom."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from asd_megatron.distributed import layout as layout_module
from asd_megatron.distributed.layout import Layout, init, record_collectives, shutdown
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


def _as_on_gpus(rank: int, folder: str) -> dict[str, Any]:
    """What `init` asks for where collectives are NCCL's: gloo answers."""
    from megatron.core import parallel_state

    asked: dict[str, Any] = {}
    join, make = dist.init_process_group, parallel_state.initialize_model_parallel

    def joining(backend: str, *, timeout: timedelta, device_id: Any, **kwargs: Any) -> None:
        asked["world"] = (backend, timeout, device_id)
        asked["dump"] = os.environ["TORCH_FR_DUMP_TEMP_FILE"], os.environ["TORCH_NCCL_DEBUG_INFO_TEMP_FILE"]
        join("gloo", timeout=timeout, **kwargs)
        assert dist.group.WORLD is not None
        dist.group.WORLD.bound_device_id = device_id

    def making(**sizes: Any) -> None:
        assert dist.group.WORLD is not None and dist.group.WORLD.bound_device_id is None  # or each group is split off
        asked["megatron"] = sizes["distributed_timeout_minutes"]
        make(**sizes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout_module.device, "backend", lambda: "nccl")
        patch.setattr(layout_module.device, "device", lambda: torch.device("cuda", 1))
        patch.setattr(dist, "init_process_group", joining)
        patch.setattr(parallel_state, "initialize_model_parallel", making)
        groups = init(Layout(), host_minutes=75, dumps=Path(folder))
        asked["bound"] = groups.world.bound_device_id
        groups.world.bound_device_id = None
        asked["host"] = groups.host._get_backend(torch.device("cpu")).options._timeout
        shutdown()
    return asked


def test_limits_on_gpus(tmp_path: Path) -> None:
    """Collectives end after ten minutes, waits on the host group later; the world knows its device."""
    (asked,) = run_ranks(_as_on_gpus, 1, str(tmp_path), init=False)
    assert asked["world"] == ("nccl", timedelta(minutes=10), torch.device("cuda", 1))
    assert asked["bound"] == torch.device("cuda", 1)
    assert asked["megatron"] == 10 and asked["host"] == timedelta(minutes=75)
    assert asked["dump"] == (f"{tmp_path}/flight_recorder_rank_",) * 2


def test_the_user_s_flight_recorder_stays() -> None:
    environment = {"TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "/mine_", "TORCH_NCCL_DUMP_ON_TIMEOUT": "0"}
    record_collectives(environment, Path("/run"))
    assert environment["TORCH_FR_DUMP_TEMP_FILE"] == environment["TORCH_NCCL_DEBUG_INFO_TEMP_FILE"] == "/mine_"
    assert environment["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "0" and environment["TORCH_FR_BUFFER_SIZE"] == "2000"


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

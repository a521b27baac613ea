"""Python objects between ranks, whatever group they are sent over."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.lib.array_utils import byte_bounds

from asd_megatron.distributed.objects import broadcast_object, first_message, gather_objects, scatter_objects
from tests.distributed.harness import run_ranks

_IDS = np.arange(1000, dtype=np.int32)
_OBJECTS: list[Any] = [{"ids": _IDS, "again": _IDS}, {"ids": _IDS * 2}, ("text", _IDS[::2] > 9, np.zeros(0))]


def _exchange(rank: int) -> dict[str, Any]:
    world = dist.group.WORLD
    assert world is not None
    pairs = [dist.new_group([0]), dist.new_group([1, 2])]
    mine = pairs[min(rank, 1)]
    return {
        "broadcast": broadcast_object({"rank": rank, "values": (1.5, None)} if rank == 1 else None, 1, world),
        "gathered": gather_objects(["x"] * rank, 2, world),
        # Ranks count within the group: its rank 1 is the world's rank 2.
        "in_group": broadcast_object(rank, mine.size() - 1, mine),
        "gathered_in_group": gather_objects(rank, mine.size() - 1, mine),
        "scattered": scatter_objects(_OBJECTS if rank == 1 else None, 1, world),
        "silent": first_message(None, world),
        "message": first_message(f"rank {rank} speaks" if rank else None, world),
        "message_in_group": first_message("here" if rank == 2 else None, mine),
    }


def test_objects_arrive_by_group_rank() -> None:
    first, second, third = run_ranks(_exchange, 3)
    for found in (first, second, third):
        assert found["broadcast"] == {"rank": 1, "values": (1.5, None)}
    assert first["gathered"] is None and second["gathered"] is None
    assert third["gathered"] == [[], ["x"], ["x", "x"]]
    assert (first["in_group"], second["in_group"], third["in_group"]) == (0, 2, 2)
    assert first["gathered_in_group"] == [0]
    assert all(found["silent"] is None and found["message"] == "rank 1 speaks" for found in (first, second, third))
    assert [found["message_in_group"] for found in (first, second, third)] == [None, "here", "here"]
    assert second["gathered_in_group"] is None and third["gathered_in_group"] == [1, 2]
    for found, sent in zip((first, second, third), _OBJECTS, strict=True):
        np.testing.assert_equal(found["scattered"], sent)


def _views(rank: int) -> bool:
    """Whether arrays arrive side by side in one buffer."""
    world = dist.group.WORLD
    assert world is not None
    found = scatter_objects([None, [_IDS, _IDS + 1]] if rank == 0 else None, 0, world)
    if rank == 0:
        return True
    (_, end), (start, _) = map(byte_bounds, found)
    return 0 <= start - end < 128


def test_arrays_arrive_in_one_buffer() -> None:
    assert run_ranks(_views, 2) == [True, True]

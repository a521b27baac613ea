from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch.distributed as dist

from tests.rollout.sglang.engine_world import closing, pair
from tests.rollout.sglang.fleets import fake_pair, make_fleet
from tests.rollout.toy import one_process_groups

__all__ = ["closing", "fake_pair", "make_fleet", "pair"]


@pytest.fixture
def process_groups() -> Iterator[Any]:
    """ProcessGroups of one rank in this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield one_process_groups()
    dist.destroy_process_group()

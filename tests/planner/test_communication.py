"""Collectives by hand, and where the ranks of a group lie."""

from __future__ import annotations

from dataclasses import replace

import pytest

from asd_megatron.distributed.layout import Layout
from asd_megatron.planner import communication as comm
from asd_megatron.planner.communication import Group, Groups
from asd_megatron.planner.hardware import accelerator

H100 = replace(accelerator("h100"), node_latency=0.0, network_latency=0.0)
RING = 450e9 * 0.75  # bytes/s that a ring inside a node reaches


def test_ranks_of_a_group_lie_on_nodes_as_the_layout_counts_them() -> None:
    groups = Groups.of(H100, Layout(tensor=4, context=2, data=4, pipeline=2, sequence_parallel=True, expert=16))
    assert groups.tensor == Group(4, 4)
    assert groups.context == Group(2, 2)  # ranks 0 and 4
    assert groups.data == Group(8, 2)  # every fourth rank: two on each of four nodes
    assert groups.pipeline == Group(2, 1)  # stages of 32 ranks
    assert groups.expert == Group(16, 8)
    assert groups.expert_data == Group(2, 1)  # ranks 0 and 16


def test_collectives_by_hand() -> None:
    node, two_nodes, apart = Group(8, 8), Group(16, 8), Group(4, 1)
    assert comm.all_gather(H100, node, 1e9) == pytest.approx(1e9 * 7 / 8 / RING)
    assert comm.all_reduce(H100, node, 1e9) == pytest.approx(2e9 * 7 / 8 / RING)
    # Eight rings of 50 GB/s adapters are slower than NVLink; a group with one rank a node has one.
    assert comm.all_gather(H100, two_nodes, 1e9) == pytest.approx(1e9 * 15 / 16 / (400e9 * 0.75))
    assert comm.all_gather(H100, apart, 1e9) == pytest.approx(1e9 * 3 / 4 / (50e9 * 0.75))
    # 8 of 16 parts leave the node through the rank's own adapter, which takes longer than the 7 that stay.
    assert comm.all_to_all(H100, two_nodes, 1e9) == pytest.approx(1e9 * 8 / 16 / (50e9 * 0.75))
    assert comm.ring_pass(H100, Group(4, 4), 1e9) == pytest.approx(1e9 * 3 / 4 / RING)
    assert comm.all_gather(H100, Group(1, 1), 1e9) == comm.all_to_all(H100, Group(1, 1), 1e9) == 0.0


def test_latency_grows_with_the_number_of_messages() -> None:
    slow = replace(H100, node_latency=5e-6, network_latency=15e-6)
    assert comm.all_gather(slow, Group(8, 8), 0, times=10) == pytest.approx(10 * 3 * 5e-6)
    assert comm.all_gather(slow, Group(16, 8), 0) == pytest.approx(4 * 15e-6)

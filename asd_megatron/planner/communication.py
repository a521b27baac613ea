"""Seconds of the collectives of a layout.

Ring collectives (Thakur et al. 2005; NCCL's): all-gather and reduce-scatter of a buffer of S bytes over n ranks take

    S (n - 1) / n / (link x efficiency)  +  latency x ceil(log2 n)

and an all-reduce twice that. A group of l ranks on each of several nodes has l rings, one through the network adapter
of each of them, so its link is the slower of the GPU's own and l times the network's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from asd_megatron.distributed.layout import Layout
from asd_megatron.planner.hardware import Accelerator


@dataclass(frozen=True)
class Group:
    """A process group: how many ranks, and how many of them are on one node."""

    ranks: int
    on_node: int

    @classmethod
    def of(cls, gpu: Accelerator, ranks: int, stride: int = 1) -> Group:
        """Of every stride-th rank. Stride 4, 8 ranks, 8 GPUs a node: 2 of them on each of 4 nodes."""
        return cls(ranks, max(1, min(ranks, gpu.per_node // stride)))

    @property
    def nodes(self) -> int:
        return -(-self.ranks // self.on_node)


@dataclass(frozen=True)
class Groups:
    """Of a layout: ranks count tensor parallelism first, then context, data and pipeline parallelism
    (`Layout.data_rank`); `expert` are consecutive ranks of a stage, `expert_data` those with the same experts."""

    tensor: Group
    context: Group
    data: Group  # that hold the same weights, experts excepted: data- and context-parallel ranks
    pipeline: Group
    expert: Group
    expert_data: Group

    @classmethod
    def of(cls, gpu: Accelerator, layout: Layout) -> Groups:
        return cls(
            tensor=Group.of(gpu, layout.tensor),
            context=Group.of(gpu, layout.context, layout.tensor),
            data=Group.of(gpu, layout.data * layout.context, layout.tensor),
            pipeline=Group.of(gpu, layout.pipeline, layout.stage_size),
            expert=Group.of(gpu, layout.expert),
            expert_data=Group.of(gpu, layout.stage_size // layout.expert, layout.expert),
        )


def link(gpu: Accelerator, group: Group) -> float:
    """Bytes/s of a ring through the group, each rank's."""
    rate = gpu.node_link if group.nodes == 1 else min(gpu.node_link, group.on_node * gpu.network)
    return rate * gpu.efficiency.link


def latency(gpu: Accelerator, group: Group) -> float:
    """Seconds of a collective without bytes."""
    hop = gpu.node_latency if group.nodes == 1 else gpu.network_latency
    return hop * math.ceil(math.log2(group.ranks)) if group.ranks > 1 else 0.0


def all_gather(gpu: Accelerator, group: Group, size: float, times: float = 1.0) -> float:
    """Seconds of `times` all-gathers, or reduce-scatters, of buffers that have `size` bytes in all.

    8 H100 of a node, 1 GB: 1e9 x 7/8 / (450e9 x 0.75) + 3 x 5 us = 2.6 ms.
    """
    if group.ranks == 1:
        return 0.0
    return size * (group.ranks - 1) / group.ranks / link(gpu, group) + times * latency(gpu, group)


def all_reduce(gpu: Accelerator, group: Group, size: float, times: float = 1.0) -> float:
    """As `all_gather`: a reduce-scatter and an all-gather."""
    return 2 * all_gather(gpu, group, size, times)


def all_to_all(gpu: Accelerator, group: Group, size: float, times: float = 1.0) -> float:
    """Seconds in which each rank sends equal parts of `size` bytes in all to every rank of the group.

    What stays on the node goes over its links, the rest through the rank's own adapter, at the same time.
    """
    n = group.ranks
    if n == 1:
        return 0.0
    inside = size * (group.on_node - 1) / n / gpu.node_link
    outside = size * (n - group.on_node) / n / gpu.network
    return max(inside, outside) / gpu.efficiency.link + times * latency(gpu, group)


def point_to_point(gpu: Accelerator, group: Group, size: float, times: float = 1.0) -> float:
    """Seconds in which a rank sends `size` bytes in all, in `times` messages, to the next of the group."""
    if group.ranks == 1:
        return 0.0
    # The next stage is on the same node where several of the group's ranks are; the border between nodes counts.
    rate, hop = (gpu.node_link, gpu.node_latency) if group.nodes == 1 else (gpu.network, gpu.network_latency)
    return size / (rate * gpu.efficiency.link) + times * hop


def ring_pass(gpu: Accelerator, group: Group, size: float, times: float = 1.0) -> float:
    """Seconds in which each rank's block goes around the group: `size` bytes are all blocks together (context
    parallelism's keys and values). Every rank sends n - 1 blocks of size / n to the next."""
    n = group.ranks
    return point_to_point(gpu, group, size * (n - 1) / n, times * (n - 1)) if n > 1 else 0.0

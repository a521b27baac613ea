"""Layouts that a number of GPUs allows, and splits of GPUs between trainer and servers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from asd_megatron.distributed.layout import Layout
from asd_megatron.models.family import ModelShape
from asd_megatron.planner.hardware import Accelerator
from asd_megatron.planner.setting import Serving

MOST_STAGES = 8
MOST_CONTEXT = 16
SPLITS = 6
"""Splits of the nodes between trainer and servers that are tried at first; more follow around the best."""


def divisors(number: int, most: int) -> list[int]:
    return [n for n in range(1, min(number, most) + 1) if number % n == 0]


def powers(most: int) -> list[int]:
    """1, 2, 4, ... up to `most`."""
    return [1 << i for i in range(most.bit_length())] if most > 0 else []


def layouts(shape: ModelShape, gpu: Accelerator, ranks: int, rollouts: int) -> Iterator[Layout]:
    """All layouts of `ranks` GPUs that can shard the model and give every data-parallel rank a rollout.

    Tensor parallelism stays within a node and comes with sequence parallelism. Pipelines of two and more stages come
    with one chunk a stage and with two. Experts are divided within a node, or as far as weights and gradients demand.
    """
    shared = math.gcd(shape.heads, shape.kv_heads)
    if shape.experts is None:
        shared = math.gcd(shared, shape.ffn)
    for tensor in divisors(shared, gpu.per_node):
        for pipeline in divisors(shape.layers, MOST_STAGES):
            for context in powers(MOST_CONTEXT):
                model, rest = tensor * pipeline * context, ranks % (tensor * pipeline * context)
                if rest or not 1 <= ranks // model <= rollouts:
                    continue
                chunks = [2] if pipeline > 1 and shape.layers % (2 * pipeline) == 0 else []
                for virtual in (None, *chunks):
                    for expert in _expert_sizes(shape, gpu, ranks // pipeline, shape.layers // pipeline):
                        yield Layout(
                            tensor=tensor,
                            pipeline=pipeline,
                            virtual_pipeline=virtual,
                            context=context,
                            data=ranks // model,
                            sequence_parallel=tensor > 1,
                            expert=expert,
                        )


def _expert_sizes(shape: ModelShape, gpu: Accelerator, stage: int, layers: int) -> list[int]:
    """Of a stage with so many ranks and layers: those within a node, and beyond it the smallest, if a rank's weights
    and gradients (2 + 4 bytes a parameter) fit."""
    experts = shape.experts
    if experts is None:
        return [1]
    size = 6.0 * layers * experts.count * 3 * shape.hidden * experts.ffn
    sizes = [n for n in powers(experts.count) if experts.count % n == 0 and stage % n == 0]
    fitting = [n for n in sizes if size / n < gpu.memory_bytes]
    return [n for n in fitting if n <= gpu.per_node] or fitting[:1]


def server_sizes(shape: ModelShape, gpu: Accelerator, serving: Serving, gpus: int) -> Iterator[Serving]:
    """Servers on all of `gpus` GPUs, each within a node; SGLang divides the heads of queries."""
    for ranks in powers(gpu.per_node):
        if gpus % ranks == 0 and shape.heads % ranks == 0 and gpu.per_node % ranks == 0:
            yield replace(serving, servers=gpus // ranks, tensor_parallel=ranks)


def splits(gpu: Accelerator, gpus: int) -> list[int]:
    """GPUs of the trainer, the rest being the servers': any number within a node, else complete nodes, at most
    `SPLITS` of them evenly spread. 12 GPUs on nodes of 8 are divided in fours."""
    if gpus <= gpu.per_node:
        return list(range(1, gpus))
    unit = math.gcd(gpus, gpu.per_node)
    units = gpus // unit
    counts = {round(units * (i + 1) / (SPLITS + 1)) for i in range(SPLITS)}
    return sorted(n * unit for n in counts if 0 < n < units)


def between(gpu: Accelerator, gpus: int, tried: list[int], best: int) -> list[int]:
    """Splits half-way from the best one to its neighbours among those that were tried."""
    order = sorted(tried)
    place = order.index(best)
    unit = math.gcd(gpus, gpu.per_node)
    found: list[int] = []
    for neighbour in (*order[max(place - 1, 0) : place], *order[place + 1 : place + 2]):
        middle = best + round((neighbour - best) / 2 / unit) * unit
        if middle not in (*tried, *found):
            found.append(middle)
    return found

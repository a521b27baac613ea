"""Seconds of a pass over a batch's packs: the layers of a pipeline stage, what its ranks exchange, and who waits.

The time of a pipeline (Narayanan et al. 2021, "Efficient large-scale language model training on GPU clusters") with m
equal packs, P stages of v chunks and t seconds a pack and stage is m t + (P - 1) t / v: of it (P - 1) / (v m + P - 1)
is bubble. Packs and stages are unequal here (the last stage has the head), so it is the slowest stage's time for all
packs and the other stages' for the most expensive one.
"""

from __future__ import annotations

from dataclasses import replace

from asd_megatron.planner import communication as comm
from asd_megatron.planner.communication import Groups
from asd_megatron.planner.compute import (
    Cost,
    Rates,
    head,
    head_tiles,
    layer_backward,
    layer_forward,
    layer_recompute,
)
from asd_megatron.planner.loads import Load, Spread
from asd_megatron.planner.setting import BYTES, Setting


def pass_time(setting: Setting, spread: Spread, *, update: bool) -> Cost:
    """One pass over a mini-batch: a forward pass, or forward and backward."""
    training = setting.training
    rates = Rates.of(setting.gpu, training.dtype, fp8=training.fp8 if update else training.fp8_scores)
    groups = Groups.of(setting.gpu, training.layout)

    def stages(load: Load) -> tuple[Cost, Cost]:
        return _stages(setting, groups, load, rates, update=update)

    return pipelined(
        stages(spread.mean),
        stages(spread.busiest),
        stages(spread.largest),
        pipeline=training.layout.pipeline,
        chunks=training.layout.virtual_pipeline or 1,
    )


def pipelined(
    mean: tuple[Cost, Cost], busiest: tuple[Cost, Cost], largest: tuple[Cost, Cost], *, pipeline: int, chunks: int
) -> Cost:
    """The time of a pass from (a stage without the head, the last stage), each for all packs of the mean rank, of the
    busiest one, and for the most expensive pack. A stage without the head does not exist in a pipeline of one."""
    busy = (mean[0] * (pipeline - 1) + mean[1]) * (1 / pipeline)
    seconds = busiest[1].seconds
    if pipeline > 1:
        inner, last = (cost.seconds for cost in largest)
        others = (pipeline - 1) * inner + last - max(inner, last)
        seconds = max(cost.seconds for cost in busiest) + others / chunks
    return replace(busy, idle=max(seconds - busy.seconds, 0.0))


def _stages(setting: Setting, groups: Groups, load: Load, rates: Rates, *, update: bool) -> tuple[Cost, Cost]:
    """(a stage without the head, the last stage) for these packs."""
    layout = setting.training.layout
    layer = layer_forward(setting, load, rates)
    exchanged = layer_exchange(setting, groups, load, rates, update=update)
    if update:
        layer += layer_backward(setting, load, rates) + layer_recompute(setting, load, rates)
    inner = (layer + exchanged) * (setting.shape.layers / layout.pipeline)
    inner += Cost(communication=_transfers(setting, groups, load, update=update))
    last = inner + head(setting, load, rates, update=update)
    return inner, last + Cost(communication=_head_exchange(setting, groups, load, update=update))


def layer_exchange(setting: Setting, groups: Groups, load: Load, rates: Rates, *, update: bool) -> Cost:
    """What a layer's ranks exchange: tensor, context and expert parallelism."""
    seconds = (
        _tensor_exchange(setting, groups, load, update=update)
        + _context_exchange(setting, groups, load, rates, update=update)
        + _expert_exchange(setting, groups, load, update=update)
    )
    return Cost(communication=seconds)


def _again(setting: Setting) -> float:
    """Forward passes of complete layers that recomputation adds to an update."""
    recompute = setting.training.recompute
    if recompute.kind != "full":
        return 0.0
    layout = setting.training.layout
    of_stage = setting.shape.layers // (layout.pipeline * (layout.virtual_pipeline or 1))
    return 1.0 if recompute.layers is None else min(recompute.layers / of_stage, 1.0)


def _hidden_bytes(setting: Setting, load: Load) -> float:
    """Of the hidden states of these packs, a context-parallel rank's."""
    return load.tokens / setting.training.layout.context * setting.shape.hidden * BYTES[setting.training.dtype]


def _tensor_exchange(setting: Setting, groups: Groups, load: Load, *, update: bool) -> float:
    """Tensor parallelism (Shoeybi et al. 2019; sequence parallelism: Korthikanti et al. 2022). Of each of the layer's
    two halves the hidden states are gathered before and reduce-scattered after it, or all-reduced, which is as much;
    the same in the backward pass, and once more gathered there with sequence parallelism, whose ranks keep their parts
    alone. Experts are not divided by tensor parallelism: their half exchanges nothing here.
    """
    layout = setting.training.layout
    halves = 1 if setting.shape.experts is not None else 2
    gathers = 2.0 * halves
    if update:
        gathers += 2.0 * halves * (1 + _again(setting)) + (halves if layout.sequence_parallel else 0)
    return comm.all_gather(setting.gpu, groups.tensor, gathers * _hidden_bytes(setting, load), gathers * load.packs)


def _context_exchange(setting: Setting, groups: Groups, load: Load, rates: Rates, *, update: bool) -> float:
    """Context parallelism: keys and values go around the ring, in the backward pass they and their gradients. With
    Transformer Engine a block travels while the one before is attended to; without it all are gathered first."""
    shape, layout = setting.shape, setting.training.layout
    if layout.context == 1:
        return 0.0
    size = load.tokens * 2.0 * shape.kv_heads * shape.head_dim / layout.tensor * BYTES[setting.training.dtype]
    forward = comm.ring_pass(setting.gpu, groups.context, size, load.packs)
    times = 1.0 + (2.0 + _again(setting) if update else 0.0)
    if setting.training.layers == "local":
        return forward * times
    pairs = 4.0 * shape.heads * shape.head_dim * load.pairs / (layout.tensor * layout.context) / rates.attention
    return max(forward - pairs, 0.0) * times


def _expert_exchange(setting: Setting, groups: Groups, load: Load, *, update: bool) -> float:
    """Expert parallelism: each token's hidden states go to its experts and back (two all-to-alls of tokens x top-k),
    and their gradients the same way."""
    shape, layout = setting.shape, setting.training.layout
    if shape.experts is None or layout.expert == 1:
        return 0.0
    own = _hidden_bytes(setting, load) / (layout.tensor if layout.sequence_parallel else 1)
    times = 2.0 * (1.0 + (1.0 + _again(setting) if update else 0.0))
    return comm.all_to_all(setting.gpu, groups.expert, times * own * shape.experts.per_token, times * load.packs)


def _transfers(setting: Setting, groups: Groups, load: Load, *, update: bool) -> float:
    """Hidden states to the next stage, and gradients back, once a chunk. Interleaved schedules transfer while the other
    chunks compute; what is left of it is the latency."""
    layout, gpu = setting.training.layout, setting.gpu
    if layout.pipeline == 1:
        return 0.0
    chunks, ways = layout.virtual_pipeline or 1, 2 if update else 1
    size = _hidden_bytes(setting, load) / (layout.tensor if layout.sequence_parallel else 1)
    return comm.point_to_point(gpu, groups.pipeline, ways * size if chunks == 1 else 0.0, ways * chunks * load.packs)


def _head_exchange(setting: Setting, groups: Groups, load: Load, *, update: bool) -> float:
    """Of the head and the embedding: hidden states gathered under sequence parallelism, their gradient reduced, and
    four float32 numbers a row of the vocabulary's ranks, one all-gather a tile (docs/head.md)."""
    layout, gpu = setting.training.layout, setting.gpu
    if layout.tensor == 1:
        return 0.0
    rows = load.rows / layout.context
    gathers = (2.0 if layout.sequence_parallel else 0.0) + (2.0 if update else 0.0)
    return comm.all_gather(
        gpu, groups.tensor, gathers * _hidden_bytes(setting, load), gathers * load.packs
    ) + comm.all_gather(gpu, groups.tensor, 16.0 * rows * layout.tensor, head_tiles(setting, load))


def gradient_exchange(setting: Setting, dense: float, experts: float) -> float:
    """Data parallelism, once an optimizer step: float32 gradients reduced over the ranks that hold the same weights
    (4 bytes a parameter), and the updated weights gathered where each updates its range alone.

    `dense`, `experts`: this rank's parameters. Qwen3-8B, 8 H100 of a node: (4 + 2) x 8.19e9 x 7/8 / 337 GB/s = 0.13 s.
    """
    training, gpu = setting.training, setting.gpu
    groups, width = Groups.of(gpu, training.layout), 1 if training.fp8_parameters else BYTES[training.dtype]
    seconds = 0.0
    for group, parameters in ((groups.data, dense), (groups.expert_data, experts)):
        if training.distributed_optimizer:
            seconds += comm.all_gather(gpu, group, (4.0 + width) * parameters, 2)
        else:
            seconds += comm.all_reduce(gpu, group, 4.0 * parameters)
    return seconds


def optimizer_ranks(setting: Setting) -> tuple[int, int]:
    """Over how many ranks the optimizer's state of (dense weights, experts) is divided."""
    layout = setting.training.layout
    if not setting.training.distributed_optimizer:
        return 1, 1
    return layout.data * layout.context, layout.stage_size // layout.expert

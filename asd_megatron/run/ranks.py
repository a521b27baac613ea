"""Joining the ranks of a run in the recipe's layout."""

from __future__ import annotations

import os
from contextlib import ExitStack

from asd_megatron.config import AnyRecipe, Recipe, check_devices, check_world
from asd_megatron.distributed import activity, determinism, device, rank_log
from asd_megatron.distributed import layout as layouts
from asd_megatron.distributed.activity import PHASES, Phase
from asd_megatron.distributed.hangs import Limits
from asd_megatron.distributed.layout import COLLECTIVE_MINUTES, Layout, ProcessGroups
from asd_megatron.distributed.lost_ranks import RankWatch
from asd_megatron.distributed.rank_log import RankLog

HOST_SECONDS = 3600.0
"""Shortest time limit of a wait on the host group."""
MARGIN_SECONDS = 300.0
"""The host group's time limit beyond the longest wait for servers, and beyond the time-outs of the phases."""
UNBOUNDED_SECONDS = 30 * 86400.0
BEFORE_NCCL_SECONDS = 60.0
"""On GPUs a rank that the others wait for is given up this long before NCCL ends them, so that a message names it."""


def join_ranks(recipe: AnyRecipe, closing: ExitStack) -> tuple[Layout, ProcessGroups]:
    """The recipe's layout for the ranks that were started, and its process groups, which `closing` leaves. Collective.
    Raises UserError for a number of ranks or a machine that the recipe does not fit."""
    if recipe.run.deterministic:
        determinism.prepare(os.environ, cuda=device.backend() == "nccl", dtype=recipe.model.dtype)
    device.prepare()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    layout = layout_of(recipe, check_world(recipe, world))
    check_devices(recipe)
    shares_memory = isinstance(recipe, Recipe) and recipe.rollout.weight_sync == "cuda_ipc"
    device.use_expandable_segments(os.environ, allowed=not shares_memory)
    rank = int(os.environ.get("RANK", "0"))
    activity.restart()
    log = RankLog(recipe.run.path, rank)
    rank_log.use(log)
    closing.callback(log.close)
    limits = phase_limits(recipe, on_gpus=device.backend() == "nccl" and world > 1)
    watch = RankWatch(rank, world, recipe.run.lost_rank_timeout, limits=limits)
    closing.callback(watch.stop)
    closing.push(layouts.leave)
    groups = layouts.init(layout, host_minutes=_longest_wait(recipe) / 60, dumps=recipe.run.path)
    # Of the groups with collectives alone: gloo counts point-to-point transfers with them.
    watch.start(groups.host, [groups.tp, groups.cp, groups.dp, groups.dp_cp, groups.ep])
    return layout, groups


def phase_limits(recipe: AnyRecipe, *, on_gpus: bool) -> Limits:
    """`run.timeout` by phase. on_gpus: the ranks wait for one another in collectives of NCCL, which has a limit of its
    own: scoring and update, where they do, get less."""
    limits: dict[Phase, float | None] = {phase: getattr(recipe.run.timeout, phase) for phase in PHASES}
    if on_gpus:
        most = 60 * COLLECTIVE_MINUTES - BEFORE_NCCL_SECONDS
        in_nccl: tuple[Phase, ...] = ("scoring", "update")
        limits |= {phase: min(seconds, most) for phase in in_nccl if (seconds := limits[phase]) is not None}
    return limits


def _longest_wait(recipe: AnyRecipe) -> float:
    """Seconds that a rank may wait on the host group: more than global rank 0 may wait for servers meanwhile, and than
    the time-out of any phase."""
    limits = phase_limits(recipe, on_gpus=False).values()
    waits = [UNBOUNDED_SECONDS if limit is None else limit for limit in limits]
    if isinstance(recipe, Recipe):
        r = recipe.rollout
        waits += [r.collect_timeout, r.server_start_timeout, r.server_wait_timeout, r.weight_sync_timeout]
    return max(HOST_SECONDS, MARGIN_SECONDS + max(waits))


def layout_of(recipe: AnyRecipe, data: int) -> Layout:
    """The recipe's layout with so many data-parallel ranks."""
    p = recipe.parallelism
    return Layout(
        tensor=p.tensor,
        pipeline=p.pipeline,
        virtual_pipeline=p.virtual_pipeline,
        context=p.context,
        data=data,
        sequence_parallel=p.sequence_parallel,
        expert=p.expert,
    )

"""Joining the ranks of a run in the recipe's layout."""

from __future__ import annotations

import os
from contextlib import ExitStack

from asd_megatron.config import AnyRecipe, Recipe, check_devices, check_world
from asd_megatron.distributed import determinism, device
from asd_megatron.distributed import layout as layouts
from asd_megatron.distributed.layout import Layout, ProcessGroups
from asd_megatron.distributed.lost_ranks import RankWatch

HOST_SECONDS = 3600.0
"""Shortest time limit of a wait on the host group."""
MARGIN_SECONDS = 300.0
"""The host group's time limit beyond the longest wait for servers."""


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
    watch = RankWatch(int(os.environ.get("RANK", "0")), world, recipe.run.lost_rank_timeout)
    closing.callback(watch.stop)
    closing.push(layouts.leave)
    groups = layouts.init(layout, host_minutes=_longest_wait(recipe) / 60, dumps=recipe.run.path)
    watch.start(groups.host)
    return layout, groups


def _longest_wait(recipe: AnyRecipe) -> float:
    """Seconds that a rank may wait on the host group: more than global rank 0 may wait for servers meanwhile."""
    if not isinstance(recipe, Recipe):
        return HOST_SECONDS
    r = recipe.rollout
    waits = (r.collect_timeout, r.server_start_timeout, r.server_wait_timeout, r.weight_sync_timeout)
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

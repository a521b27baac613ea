"""A parallel layout and its process groups."""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from asd_megatron.distributed import device
from asd_megatron.distributed.objects import objects_over
from asd_megatron.errors import UserError

_joined = False  # whether `init` made the world group; `shutdown` destroys no other
_groups: list[dist.ProcessGroup] = []  # those that the latest `init` made
_objects = ExitStack()  # holds what routes Python objects over the host group of the latest `init`
SEED = 1234  # of Megatron's own random state (dropout), which our models do not use
COLLECTIVE_MINUTES = 10.0
"""Time limit of a collective of GPUs. No rank waits in one for files, servers or a verifier: it waits on the host group
first."""
RECORDED_COLLECTIVES = 2000  # newest collectives of a rank that the flight recorder keeps
FLIGHT_RECORDER_PREFIX = "flight_recorder_rank_"  # of the files that a time-out leaves, followed by the rank


@dataclass(frozen=True)
class Layout:
    """Sizes of every kind of parallelism. Impossible sizes raise UserError.

    tensor x pipeline x context x data is the number of ranks. `expert` divides the experts of each layer over that many
    consecutive ranks of a pipeline stage, which for all other weights are tensor-, context- or data-parallel; within an
    expert nothing is sharded. With tensor 2, data 2 and expert 4 on one stage:

        rank       0      1      2      3
        attention  tp 0   tp 1   tp 0   tp 1
        experts    1/4    2/4    3/4    4/4
    """

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int | None = None
    context: int = 1
    data: int = 1
    sequence_parallel: bool = False
    expert: int = 1

    def __post_init__(self) -> None:
        if min(self.tensor, self.pipeline, self.context, self.data, self.expert) < 1:
            raise UserError(f"every size of a layout must be at least 1: {self}")
        if self.stage_size % self.expert:
            raise UserError(
                f"expert parallelism {self.expert} does not divide the {self.stage_size} ranks of a pipeline stage"
                " (tensor x context x data): lower parallelism.expert, or raise parallelism.data"
            )
        if self.virtual_pipeline is not None and (self.pipeline == 1 or self.virtual_pipeline < 2):
            raise UserError(
                "a virtual pipeline interleaves at least 2 chunks a stage, of at least 2 stages: raise "
                "parallelism.virtual_pipeline and parallelism.pipeline, or set the former to null"
            )
        if self.sequence_parallel and self.tensor == 1:
            raise UserError("sequence parallelism needs tensor parallelism: set parallelism.tensor above 1")

    @property
    def world_size(self) -> int:
        return self.pipeline * self.stage_size

    @property
    def stage_size(self) -> int:
        """Ranks of one pipeline stage."""
        return self.tensor * self.context * self.data

    def data_rank(self, rank: int) -> int:
        """The data-parallel rank of global rank `rank`: ranks count tensor parallelism first, then context, data and
        pipeline parallelism."""
        return rank // (self.tensor * self.context) % self.data

    def expert_rank(self, stage: int, part: int) -> int:
        """The global rank that is first to hold part `part` of the `expert` parts of a stage's experts."""
        return stage * self.stage_size + part


@dataclass(frozen=True)
class ProcessGroups:
    """This rank's process groups.

    `dp` has one rank for each part of the batch; `dp_cp` are all ranks that hold the same weights, experts excepted:
    `ep` are the ranks over which the experts are divided. `host` are all ranks on gloo: for Python objects, and for
    waits that may be long.
    """

    tp: dist.ProcessGroup
    pp: dist.ProcessGroup
    cp: dist.ProcessGroup
    dp: dist.ProcessGroup
    dp_cp: dist.ProcessGroup
    ep: dist.ProcessGroup
    world: dist.ProcessGroup
    host: dist.ProcessGroup


def init(layout: Layout, *, host_minutes: float = 60.0, dumps: Path | None = None) -> ProcessGroups:
    """Join the other ranks (torchrun's environment; one rank without it) and make the layout's groups. Collective.

    `host_minutes` bounds every wait on the host group; collectives of GPUs have COLLECTIVE_MINUTES, those of CPUs,
    which compute slower, the host group's limit. `dumps`: the folder for what PyTorch's flight recorder knows when a
    collective of GPUs is late. Raises UserError when the number of ranks is not the layout's.
    """
    from megatron.core import parallel_state

    global _joined
    device.prepare()
    on_gpus = device.backend() == "nccl"
    minutes = min(COLLECTIVE_MINUTES, host_minutes) if on_gpus else host_minutes
    if not dist.is_initialized():
        _joined = True
        if on_gpus and dumps is not None:
            record_collectives(os.environ, dumps)
        _join(timedelta(minutes=minutes))
    if dist.get_world_size() != layout.world_size:
        raise UserError(
            f"the layout needs {layout.world_size} ranks and there are {dist.get_world_size()}: start as many, "
            "or change the parallelism section"
        )
    shutdown_model_parallel()
    earlier = _known_groups()
    world = dist.group.WORLD
    assert world is not None
    with _unbound(world):
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor,
            pipeline_model_parallel_size=layout.pipeline,
            virtual_pipeline_model_parallel_size=layout.virtual_pipeline,
            context_parallel_size=layout.context,
            expert_model_parallel_size=layout.expert,
            expert_tensor_parallel_size=1,
            create_gloo_process_groups=False,
            distributed_timeout_minutes=max(1, math.ceil(minutes)),
        )
        host = world
        if device.backend() != "gloo":
            host = dist.new_group(backend="gloo", timeout=timedelta(minutes=host_minutes))
            _objects.enter_context(objects_over(host))
    _seed()
    _groups.extend(group for group in _known_groups() if group not in earlier)
    return ProcessGroups(
        tp=parallel_state.get_tensor_model_parallel_group(),
        pp=parallel_state.get_pipeline_model_parallel_group(),
        cp=parallel_state.get_context_parallel_group(),
        dp=parallel_state.get_data_parallel_group(),
        dp_cp=parallel_state.get_data_parallel_group(with_context_parallel=True),
        ep=parallel_state.get_expert_model_parallel_group(),
        world=world,
        host=host,
    )


def _join(limit: timedelta) -> None:
    """Make the world group. With NCCL it is bound to this rank's GPU, so that a barrier does not guess one, and its
    communicator exists at once: a machine that cannot communicate fails here."""
    backend = device.backend()
    bound = device.device() if backend == "nccl" else None
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=limit, device_id=bound)
    else:
        store = dist.HashStore()
        dist.init_process_group(backend, timeout=limit, store=store, rank=0, world_size=1, device_id=bound)


@contextmanager
def _unbound(world: dist.ProcessGroup) -> Iterator[None]:
    """Inside, groups get their communicators when they are first used. Under a bound world group each would be split
    off at once, those of Megatron's groups that nobody uses too, and hold memory of the GPU."""
    bound = world.bound_device_id
    world.bound_device_id = None
    try:
        yield
    finally:
        world.bound_device_id = bound


def record_collectives(environment: MutableMapping[str, str], folder: Path) -> None:
    """Let PyTorch's flight recorder write its newest collectives to `folder`/flight_recorder_rank_N when one is late,
    before NCCL ends the process. Variables that are set stay as they are. Both names of each: releases differ.

    `torchfrtrace --prefix flight_recorder_rank_ FOLDER` says which ranks were missing from which collective.
    """
    environment.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    for names, value in (
        (("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"), str(RECORDED_COLLECTIVES)),
        (("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"), str(folder / FLIGHT_RECORDER_PREFIX)),
    ):
        chosen = next((environment[name] for name in names if name in environment), value)
        environment.update(dict.fromkeys(names, chosen))


def _seed() -> None:
    import torch
    from megatron.core.tensor_parallel.random import initialize_rng_tracker, model_parallel_cuda_manual_seed

    torch.manual_seed(SEED)
    initialize_rng_tracker(force_reset=True)
    model_parallel_cuda_manual_seed(SEED)


def _known_groups() -> list[dist.ProcessGroup]:
    """All process groups of this rank."""
    return list(dist.distributed_c10d._world.pg_map)


def shutdown_model_parallel() -> None:
    """Destroy the layout's groups; the ranks stay joined, and `init` may follow with another layout. Collective.

    Megatron only forgets its groups. Each of gloo's keeps threads that look for work, fifty for a layout of two ranks,
    until nothing refers to it: models and optimizers do, in cycles.
    """
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    _objects.close()
    if not _groups:
        return
    if dist.get_world_size() > 1:
        dist.barrier()
    for group in _groups:
        dist.destroy_process_group(group)
    _groups.clear()
    gc.collect()


def shutdown() -> None:
    """Destroy the layout's groups, and the world group if `init` made it. Waits for the other ranks. Safe to call
    twice."""
    global _joined
    if dist.is_initialized():
        shutdown_model_parallel()
        if _joined:
            dist.destroy_process_group()
    _joined = False


def leave(error_type: type[BaseException] | None, *_: object) -> None:
    """`shutdown` as the exit of a context (`ExitStack.push(leave)`). After an exception with other ranks still joined
    it does nothing: destroying the groups waits for ranks that may be in a collective. The process has to end then."""
    if error_type is None or not dist.is_initialized() or dist.get_world_size() == 1:
        shutdown()

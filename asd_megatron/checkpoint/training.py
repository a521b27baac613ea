"""Training checkpoints: weights, optimizer, schedule and run state, for resuming exactly where a run stopped.

    CHECKPOINTS/step_000060/   .metadata, *.distcp, common.pt, metadata.json   Megatron's `torch_dist` format
                               run_state.json                                  what the run itself must know
    CHECKPOINTS/latest         the name of the newest complete one (`lineage`)

Tensors are stored in their model's shape, so that another layout (or data-parallel size) can load them. `CHECKPOINTS`
must be on a file system that all ranks share. `save` and `load` are collective over all ranks.

Extra states of modules (keys `..._extra_state`) are neither stored nor loaded. Transformer Engine unpickles its own, so
a crafted one would run code; its modules have some where Megatron's have none, so checkpoints of one would not load
into the other; and only FP8's delayed scaling, which is not used here, keeps anything in them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from asd_megatron.checkpoint import copies_state, lineage, optimizer_state
from asd_megatron.checkpoint.lineage import RUN_STATE
from asd_megatron.checkpoint.run_state import RunStateFile
from asd_megatron.checkpoint.safety import check_metadata, weights_only
from asd_megatron.checkpoint.shards import save_shards, saving
from asd_megatron.distributed.objects import first_message, on_rank_zero
from asd_megatron.errors import UserError
from asd_megatron.files import atomic_folder, remove_partial
from asd_megatron.models.compat import optimizer_parts
from asd_megatron.models.port import ModelPort
from asd_megatron.models.weight_copies import CopyName, WeightCopies

if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron.core.transformer import MegatronModule

T = TypeVar("T")


def save(
    folder: str | Path,
    step: int,
    port: ModelPort,
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    run_state: dict[str, Any],
    *,
    keep: int = 2,
    copies: WeightCopies | None = None,
) -> Path:
    """Write `folder`/step_NNNNNN, name it in `folder`/latest, then remove the checkpoints of abandoned branches and all
    but the newest `keep` of this one.

    `port` is wrapped in Megatron's DDP. `run_state` holds numbers, strings, lists and string-keyed dicts (else
    ValueError); rank 0's is stored. `copies` are stored beside the weights. Readers see a complete checkpoint or none:
    it is written aside and renamed.

    An error on any rank is raised on all, a UserError where the operating system refused; older checkpoints and
    `latest` then stay as they were.
    """
    folder = Path(folder)
    target = folder / lineage.name(step)
    host = port.process_groups.host
    saving_here = partial(saving, folder, step)
    stored_copies = () if copies is None else copies.names
    content = RunStateFile(optimizer_state.is_distributed(optimizer), stored_copies, run_state)
    with ExitStack() as written:

        def begin() -> tuple[str, str]:
            text = content.text(step)
            with saving_here():
                remove_partial(folder)
                return str(written.enter_context(atomic_folder(target, replace=True))), text

        aside, text = on_rank_zero(begin, host)
        state = _state(port, optimizer, scheduler, loading=False)
        if copies is not None:
            _add_copies(state, port, copies, copies.names)
        save_shards(aside, state, host, saving_here)

        def finish() -> None:
            with saving_here():
                (Path(aside) / RUN_STATE).write_text(text, encoding="utf-8")
                written.close()
                previous = lineage.latest_step(folder)
                lineage.write_latest(folder, target.name)
            lineage.prune(folder, step, previous, keep)

        on_rank_zero(finish, host)
    return target


def load(
    path: str | Path,
    port: ModelPort,
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    copies: WeightCopies | None = None,
) -> dict[str, Any]:
    """Load the checkpoint `path` (a step_NNNNNN folder) into the port, the optimizer and the scheduler; return its
    run state.

    The layout may differ from the one that wrote it, the kind of optimizer (distributed or not) may not. The
    optimizer's and the schedule's hyper-parameters stay those they were built with: from the checkpoint come the
    moments and the step counts. Of `copies`, those are loaded that the checkpoint stores; the others stay as they are.
    UserError, on every rank, when the folder is not a complete checkpoint, contains more than data, or belongs to
    another model.
    """
    path = Path(path)
    host = port.process_groups.host
    stored = _on_every_rank(lambda: _check(path, optimizer_state.is_distributed(optimizer)), host)
    state = _state(port, optimizer, scheduler, loading=True)
    kept: copies_state.Entries = {}
    if copies is not None:
        kept = _add_copies(state, port, copies, [name for name in copies.names if name in stored.copies])
    loaded = _on_every_rank(lambda: _read(path, state), host)
    _on_every_rank(lambda: _restore(path, loaded, port, optimizer, scheduler), host)
    if port.dtype is torch.bfloat16:
        _copy_master_weights(port, optimizer)
    for section, tensors in kept.items():
        for key, tensor in tensors.items():
            tensor.copy_(loaded[section][key])
    return stored.run_state


def _chunks(port: ModelPort) -> dict[str, MegatronModule]:
    """The model chunks without their DDP wrapper, under Megatron's keys."""
    bare = [getattr(chunk, "module", chunk) for chunk in port.chunks]
    return {"model": bare[0]} if len(bare) == 1 else {f"model{i}": chunk for i, chunk in enumerate(bare)}


def _is_extra_state(key: str) -> bool:
    """`final_layernorm._extra_state`, and what Megatron renames it to: `linear_qkv.layer_norm__extra_state`."""
    return "_extra_state" in key.rpartition(".")[2]


def _state(
    port: ModelPort, optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler, *, loading: bool
) -> dict[str, Any]:
    """Megatron's sharded state of everything that is not run state, without extra states."""
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
    }
    model = {}
    for key, chunk in _chunks(port).items():
        sharded = chunk.sharded_state_dict(metadata=dict(metadata))  # a copy: Megatron completes it in place
        model[key] = {k: v for k, v in sharded.items() if not _is_extra_state(k)}
    optimizer_state.fill(optimizer)
    # The optimizer finds its parameters' shards in the nested dict: chunks share key names, a flat one would lose some.
    with optimizer_state.gathering(optimizer):
        sharded = optimizer.sharded_state_dict(dict(model), is_loading=loading, metadata=dict(metadata))
    for tensors in model.values():
        _in_model_dtype(tensors)
    return {**model, "optimizer": sharded, "scheduler": {"num_steps": scheduler.num_steps}}


def _in_model_dtype(tensors: dict[str, Any]) -> None:
    """FP8 parameters are stored as bfloat16, which every precision can load. In place."""
    from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8

    force_all_tensors_to_non_fp8(tensors)


def _add_copies(
    state: dict[str, Any], port: ModelPort, copies: WeightCopies, names: Sequence[CopyName]
) -> copies_state.Entries:
    """Add the sharded state of the copies `names` to `state`; returns their tensors, likewise by section and name."""
    model = {chunk: state[chunk] for chunk in _chunks(port)}
    added: copies_state.Entries = {}
    for name in names:
        tensors = copies_state.tensors(copies, name, model)
        state |= copies_state.sharded(name, model, tensors)
        added |= tensors
    return added


# ---------------------------------------------------------------- reading


def _on_every_rank(action: Callable[[], T], host: dist.ProcessGroup) -> T:
    """This rank's result of `action`; a UserError on any rank is raised on all. Collective."""
    result: list[T] = []
    message: str | None = None
    try:
        result.append(action())
    except UserError as error:
        message = str(error)
    message = first_message(message, host)
    if message is not None:
        raise UserError(message)
    return result[0]


def _check(path: Path, distributed: bool) -> RunStateFile:
    """The run_state.json of a checkpoint whose metadata is safe to read and whose optimizer is of this kind."""
    stored = RunStateFile.read(path)
    if stored.distributed_optimizer != distributed:
        kind = "an optimizer that is not distributed" if distributed else "the distributed optimizer"
        raise UserError(f"{path} was written with {kind}: set parallelism.distributed_optimizer as it was")
    check_metadata(path)
    return stored


def _read(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint's content in place of the shards in `state`."""
    from megatron.core import dist_checkpointing
    from torch.distributed.checkpoint.api import CheckpointException

    wanted = {key: part.keys() for key, part in state.items()}
    try:
        with weights_only(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of Megatron-Core's and PyTorch's own code
            loaded, missing, unexpected = dist_checkpointing.load(state, str(path), strict="return_all")
        # Only what was asked for: common.pt, which is merged in, may name anything.
        content = {key: {k: v for k, v in loaded[key].items() if k in wanted[key]} for key in wanted}
    except (Exception, CheckpointException) as error:
        raise _unfit(path, error) from error
    differing = sorted(
        key for key in missing | unexpected if not (_is_extra_state(key) or copies_state.is_unread(key, state))
    )
    if differing:
        raise UserError(
            f"{path} does not fit this model and optimizer: {len(differing)} tensors are in one of them only, such as "
            f"{', '.join(differing[:3])}; resume with the model that wrote it"
        )
    return content


def _restore(
    path: Path,
    loaded: dict[str, Any],
    port: ModelPort,
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
) -> None:
    try:
        for key, chunk in _chunks(port).items():
            result = chunk.load_state_dict(loaded[key], strict=False)
            wrong = [k for k in (*result.missing_keys, *result.unexpected_keys) if not _is_extra_state(k)]
            if wrong:
                raise UserError(f"{path} does not fit this model: {', '.join(sorted(wrong)[:3])}")
        with optimizer_state.loading(optimizer, loaded["optimizer"]):
            optimizer.load_state_dict(loaded["optimizer"])
        scheduler.num_steps = int(loaded["scheduler"]["num_steps"])
        scheduler.step(0)
    except UserError:
        raise
    except Exception as error:
        raise _unfit(path, error) from error


def _copy_master_weights(port: ModelPort, optimizer: MegatronOptimizer) -> None:
    """Weights are their float32 master weights rounded to the precision at hand: a checkpoint of FP8 parameters has
    lost that in its bfloat16 weights. Collective."""
    for part in optimizer_parts(optimizer):
        part._copy_main_params_to_model_params()
    if optimizer_state.is_distributed(optimizer):
        for chunk in port.chunks:
            chunk.start_param_sync(force_sync=True)


def _unfit(path: Path, error: BaseException) -> UserError:
    """The UserError for what Megatron or torch raised while reading, in one line."""
    failures = getattr(error, "failures", None)  # of a CheckpointException: what failed, by rank
    first = next(iter(failures.values()))[0] if failures else error
    reason = " ".join(f"{type(first).__name__}: {first}".split())
    return UserError(
        f"{path} does not fit this model and optimizer, or is damaged ({reason:.400}): resume from another checkpoint, "
        "or with the model that wrote it"
    )

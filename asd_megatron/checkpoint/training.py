"""Training checkpoints: weights, optimizer, schedule and run state, for going on exactly where a run stopped.

    CHECKPOINTS/step_000060/   .metadata, *.distcp, common.pt, metadata.json   Megatron's `torch_dist` format
                               run_state.json                                  what the run itself must know
    CHECKPOINTS/latest         the name of the newest whole one

Tensors are stored in their model's shape, so that another layout (or data-parallel size) can load them. `CHECKPOINTS`
must be on a file system that all ranks share. Every function here is collective over all ranks, but for `latest` and
`name_latest`.
"""

from __future__ import annotations

import json
import re
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from asd_megatron.checkpoint import optimizer_state
from asd_megatron.checkpoint.safety import check_metadata, weights_only
from asd_megatron.distributed.objects import on_rank_zero
from asd_megatron.errors import UserError
from asd_megatron.files import atomic_folder, atomic_write, remove_partial

FORMAT = 1
RUN_STATE = "run_state.json"
LATEST = "latest"
_NAME = re.compile(r"step_(\d{6,})")


def save(
    folder: str | Path,
    step: int,
    port: Any,
    optimizer: Any,
    scheduler: Any,
    run_state: dict[str, Any],
    *,
    keep: int = 2,
) -> Path:
    """Write `folder`/step_NNNNNN, name it in `folder`/latest, then remove all but the newest `keep` checkpoints.

    `port` is a ModelPort wrapped in Megatron's DDP, `optimizer` and `scheduler` are Megatron's. `run_state` holds
    numbers, strings, lists and string-keyed dicts (else ValueError); rank 0's is stored. Readers see a whole checkpoint
    or none: it is written aside and renamed. An error on any rank is raised on all.
    """
    text = _run_state_text(step, optimizer, run_state)
    folder = Path(folder)
    with ExitStack() as written:

        def begin() -> str:
            remove_partial(folder)
            return str(written.enter_context(atomic_folder(folder / name(step), replace=True)))

        partial = on_rank_zero(begin, port.process_groups.host)
        _save_shards(partial, _state(port, optimizer, scheduler, loading=False))

        def finish() -> None:
            (Path(partial) / RUN_STATE).write_text(text)
            written.close()
            name_latest(folder, name(step))
            _prune(folder, step, keep)

        on_rank_zero(finish, port.process_groups.host)
    return folder / name(step)


def load(path: str | Path, port: Any, optimizer: Any, scheduler: Any) -> dict[str, Any]:
    """Load the checkpoint `path` (a step_NNNNNN folder) into the port, the optimizer and the scheduler; return its
    run state.

    The layout may differ from the one that wrote it, the kind of optimizer (distributed or not) may not. The
    optimizer's and the schedule's hyper-parameters stay those they were built with: from the checkpoint come the
    moments and the step counts. UserError when the folder is not a whole checkpoint, contains more than data, or
    belongs to another model.
    """
    from megatron.core import dist_checkpointing
    from torch.distributed.checkpoint.api import CheckpointException

    path = Path(path)
    stored = _read_run_state(path)
    if stored["distributed_optimizer"] != optimizer_state.is_distributed(optimizer):
        kind = (
            "the distributed optimizer" if stored["distributed_optimizer"] else "an optimizer that is not distributed"
        )
        raise UserError(f"{path} was written with {kind}: set parallelism.distributed_optimizer as it was")
    check_metadata(path)
    state = _state(port, optimizer, scheduler, loading=True)
    try:
        with weights_only():
            loaded = dist_checkpointing.load(state, str(path), strict="raise_all")
    except (Exception, CheckpointException) as error:  # the latter is a BaseException
        raise UserError(f"{path} does not fit this model and optimizer, or is damaged: {error}") from error
    for key, chunk in _chunks(port).items():
        result = chunk.load_state_dict(loaded[key], strict=False)
        wrong = [k for k in (*result.missing_keys, *result.unexpected_keys) if not k.endswith("_extra_state")]
        if wrong:
            raise UserError(f"{path} does not fit this model: {', '.join(sorted(wrong))}")
    with optimizer_state.loading(optimizer, loaded["optimizer"]):
        optimizer.load_state_dict(loaded["optimizer"])
    scheduler.num_steps = loaded["scheduler"]["num_steps"]
    scheduler.step(0)
    return stored["run_state"]


def latest(folder: str | Path) -> Path | None:
    """The newest whole checkpoint of a run's `checkpoints` folder, None when there is none."""
    folder = Path(folder)
    try:
        named = (folder / LATEST).read_text().strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not _NAME.fullmatch(named) or not (folder / named / RUN_STATE).is_file():
        raise UserError(
            f"{folder / LATEST} names {named!r}, which is no checkpoint in {folder}: "
            "write the name of one that is into it, or remove it to start anew"
        )
    return folder / named


def name_latest(folder: str | Path, checkpoint: str) -> None:
    """Make `checkpoint` the one that `latest` finds in a run's `checkpoints` folder. Not collective."""
    atomic_write(Path(folder) / LATEST, checkpoint + "\n")


def name(step: int) -> str:
    """The folder name of a step's checkpoint."""
    return f"step_{step:06d}"


def _chunks(port: Any) -> dict[str, Any]:
    """The model chunks without their DDP wrapper, under Megatron's keys."""
    bare = [getattr(chunk, "module", chunk) for chunk in port.chunks]
    return {"model": bare[0]} if len(bare) == 1 else {f"model{i}": chunk for i, chunk in enumerate(bare)}


def _state(port: Any, optimizer: Any, scheduler: Any, *, loading: bool) -> dict[str, Any]:
    """Megatron's sharded state of everything that is not run state."""
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
    }
    # Megatron completes the metadata in place: every call gets its own.
    model = {key: chunk.sharded_state_dict(metadata=dict(metadata)) for key, chunk in _chunks(port).items()}
    optimizer_state.fill(optimizer)
    # The optimizer finds its parameters' shards in the nested dict: chunks share key names, a flat one would lose some.
    with optimizer_state.gathering(optimizer):
        sharded = optimizer.sharded_state_dict(dict(model), is_loading=loading, metadata=dict(metadata))
    return {**model, "optimizer": sharded, "scheduler": {"num_steps": scheduler.num_steps}}


def _save_shards(folder: str, state: dict[str, Any]) -> None:
    """Megatron's save with a writer that stays in this process.

    Its own forks workers out of a process full of threads, keeps a helper process alive and hangs when a worker dies.
    """
    import torch.distributed.checkpoint as torch_checkpoint
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import torch as strategies

    class InProcess(strategies.TorchDistSaveShardedStrategy):
        def save(self, sharded_state_dict: Any, checkpoint_dir: Any) -> None:
            flat = strategies._replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)[0]
            planner = strategies.MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
            writer = torch_checkpoint.FileSystemWriter(checkpoint_dir, thread_count=2)
            torch_checkpoint.save(
                strategies.mcore_to_pyt_state_dict(flat, False), storage_writer=writer, planner=planner
            )

    dist_checkpointing.save(state, folder, sharded_strategy=InProcess("torch_dist", 1))


def _run_state_text(step: int, optimizer: Any, run_state: dict[str, Any]) -> str:
    content = {
        "format": FORMAT,
        "step": step,
        "distributed_optimizer": optimizer_state.is_distributed(optimizer),
        "run_state": run_state,
    }
    _check_plain(run_state, "run_state")
    return json.dumps(content, indent=2)  # with Python's NaN and Infinity: the state must come back as it was


def _check_plain(value: Any, where: str) -> None:
    """ValueError for what JSON would change or refuse (tuples may become lists)."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{where} has the key {key!r}: a checkpoint keeps string keys only")
            _check_plain(inner, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            _check_plain(inner, f"{where}[{i}]")
    elif type(value) not in (str, int, float, bool, type(None)):
        raise ValueError(f"{where} is a {type(value).__name__}: a checkpoint keeps numbers, strings, lists and dicts")


def _read_run_state(path: Path) -> dict[str, Any]:
    try:
        stored = json.loads((path / RUN_STATE).read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"{path} is no training checkpoint ({RUN_STATE} is missing): give a folder checkpoints/step_NNNNNN of a run"
        ) from error
    except ValueError as error:
        raise UserError(f"{path / RUN_STATE} is damaged ({error}): resume from another checkpoint") from error
    if not isinstance(stored, dict) or stored.get("format") != FORMAT:
        raise UserError(f"{path / RUN_STATE} is not of format {FORMAT}: another version of asd_megatron wrote it")
    return stored


def _prune(folder: Path, step: int, keep: int) -> None:
    """Remove the oldest checkpoints, never the one just written."""
    found = [(int(m.group(1)), p) for p in folder.iterdir() if p.is_dir() and (m := _NAME.fullmatch(p.name))]
    others = sorted((s, p) for s, p in found if s != step)
    for _, path in others[: max(0, len(others) - (keep - 1))]:
        shutil.rmtree(path)

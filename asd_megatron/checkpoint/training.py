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

import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed as dist

from asd_megatron.checkpoint import copies_state, lineage, optimizer_state
from asd_megatron.checkpoint.lineage import RUN_STATE
from asd_megatron.checkpoint.safety import check_metadata, weights_only
from asd_megatron.distributed.objects import first_message, on_rank_zero, share_outcome
from asd_megatron.errors import UserError
from asd_megatron.files import atomic_folder, read_json_object, remove_partial, system_reason
from asd_megatron.models.port import ModelPort
from asd_megatron.models.weight_copies import CopyName, WeightCopies

if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron.core.transformer import MegatronModule

T = TypeVar("T")

FORMAT = 1
_TORCH_SAVE = ("inline_container", "iostream error")  # in what `torch.save` raises when the system refuses a write
_TRIAL_BYTES = 1 << 20


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
    saving = partial(_saving, folder, step)
    with ExitStack() as written:

        def begin() -> tuple[str, str]:
            text = _run_state_text(step, optimizer, run_state, () if copies is None else copies.names)
            with saving():
                remove_partial(folder)
                return str(written.enter_context(atomic_folder(target, replace=True))), text

        aside, text = on_rank_zero(begin, host)
        state = _state(port, optimizer, scheduler, loading=False)
        if copies is not None:
            _add_copies(state, port, copies, copies.names)
        _save_shards(aside, state, host, saving)

        def finish() -> None:
            with saving():
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
    moments and the step counts. Of `copies`, those are loaded that the checkpoint stores (`stored_copies`); the others
    stay as they are. UserError, on every rank, when the folder is not a complete checkpoint, contains more
    than data, or belongs to another model.
    """
    path = Path(path)
    world = port.process_groups.world
    stored = _on_every_rank(lambda: _check(path, optimizer_state.is_distributed(optimizer)), world)
    state = _state(port, optimizer, scheduler, loading=True)
    stored_names = _names_of_copies(stored)
    kept: copies_state.Entries = {}
    if copies is not None:
        kept = _add_copies(state, port, copies, [name for name in copies.names if name in stored_names])
    loaded = _on_every_rank(lambda: _read(path, state), world)
    _on_every_rank(lambda: _restore(path, loaded, port, optimizer, scheduler), world)
    for section, tensors in kept.items():
        for key, tensor in tensors.items():
            tensor.copy_(loaded[section][key])
    run_state: dict[str, Any] = stored["run_state"]
    return run_state


def stored_copies(path: str | Path) -> tuple[CopyName, ...]:
    """The copies of weights that the checkpoint `path` stores. Raises UserError for a folder that is no checkpoint."""
    return _names_of_copies(_read_run_state(Path(path)))


def _names_of_copies(stored: dict[str, Any]) -> tuple[CopyName, ...]:
    """From run_state.json, in which checkpoints of earlier versions name none."""
    return tuple(name for name in copies_state.NAMES if name in stored.get("weight_copies", []))


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
    return {**model, "optimizer": sharded, "scheduler": {"num_steps": scheduler.num_steps}}


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


# ---------------------------------------------------------------- writing


@contextmanager
def _saving(folder: Path, step: int) -> Iterator[None]:
    """Raise what the operating system refused inside as a UserError."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except (Exception, CheckpointException) as error:
        reason = _reason(error, folder)
        if reason is not None:
            raise UserError(
                f"the checkpoint of step {step} cannot be saved in {folder} ({reason}): free space there (or raise a"
                " limit: quota, ulimit -f), or choose another run.folder"
            ) from error
        if isinstance(error, CheckpointException):  # a BaseException
            raise RuntimeError(f"the checkpoint of step {step} cannot be saved in {folder}: {error}") from error
        raise


def _reason(error: BaseException, folder: Path) -> str | None:
    """The operating system's reason for a failed write in `folder`, None when something else failed."""
    from torch.distributed.checkpoint.api import CheckpointException

    if isinstance(error, CheckpointException):  # what failed, by rank
        reasons = [_reason(failure, folder) for failure, _ in error.failures.values()]
        return next((reason for reason in reasons if reason is not None), None)
    refusal = _refusal(error, folder)
    return None if refusal is None else system_reason(refusal)


def _refusal(error: BaseException, folder: Path) -> OSError | None:
    """The operating system's error behind a failed write in `folder`, None when something else failed.

    `torch.save` into a Python stream raises `inline_container.cc: unexpected pos 704 vs 598` with the OSError in its
    context; into a path it raises `iostream error` alone, and a trial write finds out why.
    """
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and not isinstance(link, UserError) and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    for known in chain:
        if isinstance(known, OSError):
            return known
    for failed in chain:
        if isinstance(failed, RuntimeError) and any(word in str(failed) for word in _TORCH_SAVE):
            return _trial_write(folder) or OSError(f"a file cannot be written: {str(failed).splitlines()[0]}")
    return None


def _trial_write(folder: Path) -> OSError | None:
    """The operating system's error when a file is written in `folder`, which is full perhaps; None if it can be."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_TRIAL_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error
    return None


def _save_shards(
    folder: str, state: dict[str, Any], host: dist.ProcessGroup, saving: Callable[[], AbstractContextManager[None]]
) -> None:
    """Megatron's save with a writer that stays in this process.

    Its own forks workers out of a process full of threads, keeps a helper process alive and hangs when a worker dies.
    What global rank 0 writes alone, before and after the shards, is shared with the others, who would wait for it.
    """
    import torch.distributed.checkpoint as torch_checkpoint
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
    from megatron.core.dist_checkpointing.strategies import torch as strategies

    class InProcess(strategies.TorchDistSaveShardedStrategy):
        begun = False

        def save(self, sharded_state_dict: Any, checkpoint_dir: Any) -> None:
            self.begun = True
            share_outcome(None, None, host)  # common.pt is written
            flat = strategies._replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)[0]
            planner = strategies.MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
            # One thread: torch loses the error of a second one, and completes the checkpoint without its tensors.
            writer = Writer(checkpoint_dir, thread_count=1)
            torch_checkpoint.save(
                strategies.mcore_to_pyt_state_dict(flat, False), storage_writer=writer, planner=planner
            )
            on_rank_zero(partial(self._save_config, str(checkpoint_dir)), host)

        def _save_config(self, checkpoint_dir: str) -> None:
            with saving():
                save_config(CheckpointingConfig(self.backend, self.version), checkpoint_dir)

    class Writer(torch_checkpoint.FileSystemWriter):
        def write_data(self, plan: Any, planner: Any) -> Any:
            try:
                return super().write_data(plan, planner)
            except RuntimeError as error:
                refusal = _refusal(error, Path(folder))
                if refusal is None:
                    raise
                raise refusal from None  # torch sends an error to the other ranks without its context

    strategy = InProcess("torch_dist", 1)
    try:
        with saving():
            dist_checkpointing.save(state, folder, sharded_strategy=strategy)
    except Exception as error:
        if not strategy.begun:  # the others wait in its `save`
            share_outcome(None, error, host)
        raise


def _run_state_text(
    step: int, optimizer: MegatronOptimizer, run_state: dict[str, Any], copies: Sequence[CopyName]
) -> str:
    content = {
        "format": FORMAT,
        "step": step,
        "distributed_optimizer": optimizer_state.is_distributed(optimizer),
        "weight_copies": list(copies),
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


# ---------------------------------------------------------------- reading


def _on_every_rank(action: Callable[[], T], world: dist.ProcessGroup) -> T:
    """This rank's result of `action`; a UserError on any rank is raised on all. Collective."""
    result: list[T] = []
    message: str | None = None
    try:
        result.append(action())
    except UserError as error:
        message = str(error)
    message = first_message(message, world)
    if message is not None:
        raise UserError(message)
    return result[0]


def _check(path: Path, distributed: bool) -> dict[str, Any]:
    """The content of run_state.json, of a checkpoint whose metadata is safe to read and whose optimizer is of this
    kind."""
    stored = _read_run_state(path)
    if stored["distributed_optimizer"] != distributed:
        kind = "an optimizer that is not distributed" if distributed else "the distributed optimizer"
        raise UserError(f"{path} was written with {kind}: set parallelism.distributed_optimizer as it was")
    check_metadata(path)
    return stored


def _read_run_state(path: Path) -> dict[str, Any]:
    if not (path / RUN_STATE).is_file():
        raise UserError(
            f"{path} is no training checkpoint ({RUN_STATE} is missing): give a folder checkpoints/step_NNNNNN of a run"
        )
    stored = read_json_object(path / RUN_STATE, "it is damaged, resume from another checkpoint", non_finite=True)
    if stored.get("format") != FORMAT:
        raise UserError(f"{path / RUN_STATE} is not of format {FORMAT}: another version of asd_megatron wrote it")
    kinds = {"distributed_optimizer": bool, "run_state": dict, "weight_copies": list}
    if any(not isinstance(stored.get(key, []), kind) for key, kind in kinds.items()):
        raise UserError(f"{path / RUN_STATE} is damaged: resume from another checkpoint")
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


def _unfit(path: Path, error: BaseException) -> UserError:
    """The UserError for what Megatron or torch raised while reading, in one line."""
    failures = getattr(error, "failures", None)  # of a CheckpointException: what failed, by rank
    first = next(iter(failures.values()))[0] if failures else error
    reason = " ".join(f"{type(first).__name__}: {first}".split())
    return UserError(
        f"{path} does not fit this model and optimizer, or is damaged ({reason:.400}): resume from another checkpoint, "
        "or with the model that wrote it"
    )

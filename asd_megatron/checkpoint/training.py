"""Training checkpoints: weights, optimizer, schedule and run state, for resuming exactly where a run stopped.

    CHECKPOINTS/step_000060/   .metadata, *.distcp, common.pt, metadata.json   Megatron's `torch_dist` format (`shards`)
                               run_state.json                                  what the run itself must know
                               manifest.json                                   bytes and checksums (`manifest`)
    CHECKPOINTS/latest         the name of the newest complete one (`lineage`)

Tensors are stored in their model's shape, as boxes of it (`parts`), so that another layout (or data-parallel size) can
load them. Every rank writes and reads its own part alone: what data-parallel ranks share is spread over them by size.
`CHECKPOINTS` must be on a file system that all ranks share. `save` and `load` are collective over all ranks.

Extra states of modules (keys `..._extra_state`), which are objects, are neither stored nor loaded. Transformer Engine
unpickles its own, so a crafted one would run code; its modules have some where Megatron's have none; and only FP8's
delayed scaling, which is not used here, keeps anything in them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from asd_megatron.checkpoint import copies_state, lineage, optimizer_state
from asd_megatron.checkpoint.background import Background
from asd_megatron.checkpoint.common_state import load_common
from asd_megatron.checkpoint.distcp import DistributedCheckpoint
from asd_megatron.checkpoint.lineage import RUN_STATE
from asd_megatron.checkpoint.manifest import DamagedCheckpoint, Manifest, damage, damaged
from asd_megatron.checkpoint.parts import Box, Part, Sharded, boxes, local, own
from asd_megatron.checkpoint.run_state import RunStateFile
from asd_megatron.checkpoint.shards import (
    Shard,
    check_files,
    check_space,
    saving,
    write_common,
    write_metadata,
    write_shard,
)
from asd_megatron.checkpoint.verification import NO_MANIFEST, open_checked
from asd_megatron.distributed import activity
from asd_megatron.distributed.objects import Told, first_message, gather_objects, on_rank_zero
from asd_megatron.errors import UserError
from asd_megatron.files import atomic_folder, remove_partial
from asd_megatron.models import te
from asd_megatron.models.port import ModelPort
from asd_megatron.models.weight_copies import CopyName, WeightCopies

if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

T = TypeVar("T")
log = logging.getLogger(__name__)


def save(
    folder: str | Path,
    step: int,
    port: ModelPort,
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    run_state: dict[str, Any],
    *,
    keep: int = 2,
    keep_every: int = 0,
    copies: WeightCopies | None = None,
    background: Background | None = None,
) -> Path:
    """Write `folder`/step_NNNNNN, name it in `folder`/latest, then remove the checkpoints of abandoned branches and all
    but the newest `keep` of this one and those of every `keep_every`-th step (0: none).

    `port` is wrapped in Megatron's DDP. `run_state` holds numbers, strings, lists and string-keyed dicts (else
    ValueError); rank 0's is stored. `copies` are stored beside the weights. Readers see a complete checkpoint or none:
    it is written aside, flushed to the disk with all its files, and renamed; nothing is removed before that. Host
    memory: one tensor of a rank's part at a time.

    background: writes it while training goes on, and names it once it is complete; the state may change as soon as
    `save` returns. Host memory: this rank's part; where a rank lacks it, all write at once after a warning. Nothing
    else may be in flight there.

    An error on any rank is raised on all, a UserError where the operating system refused, here or by `background`;
    older checkpoints and `latest` then stay as they were.
    """
    if background is not None and background.step:
        raise RuntimeError("a checkpoint is in flight: settle it first")
    folder = Path(folder)
    host = port.process_groups.host
    stored_copies = () if copies is None else copies.names
    content = RunStateFile(optimizer_state.is_distributed(optimizer), stored_copies, run_state)
    written = ExitStack()
    parts = own(_parts(port, optimizer, copies, stored_copies))
    needed = torch.tensor(sum(part.bytes for part in parts))
    if host.size() > 1:
        dist.all_reduce(needed, group=host)

    def begin() -> str:
        text = content.text(step)
        with saving(folder, step), ExitStack() as opened:
            folder.mkdir(parents=True, exist_ok=True)
            remove_partial(folder)
            check_space(folder, int(needed))
            aside = opened.enter_context(atomic_folder(folder / lineage.name(step), replace=True))
            # Now, not with the rest: an export of the step that is older than this file is another branch's.
            (aside / RUN_STATE).write_text(text, encoding="utf-8")
            written.push(opened.pop_all())
            return str(aside)

    aside = on_rank_zero(begin, host)
    common = {
        "optimizer": {"param_groups": [{"step": optimizer_state.step_count(optimizer)}]},
        "scheduler": {"num_steps": scheduler.num_steps},
    }
    layout = {name: size for name, size in asdict(port.layout).items() if size not in (1, None, False)}
    stage = str(run_state.get("stage", ""))
    write = _Write(folder, step, stage, layout, Path(aside), written, common, keep, keep_every, host.rank())
    if background is None or not background.start(step, write, parts):
        write(parts, host)
    return folder / lineage.name(step)


@dataclass(frozen=True)
class _Write:
    """The writing of one checkpoint whose folder `aside` has been created. `written` renames it on global rank 0."""

    folder: Path
    step: int
    stage: str
    layout: dict[str, int]
    aside: Path
    written: ExitStack
    common: dict[str, Any]
    keep: int
    keep_every: int
    rank: int

    def __call__(self, parts: Iterable[Part], group: dist.ProcessGroup) -> None:
        """Write this rank's parts and, on global rank 0, what completes the checkpoint. Collective over `group`, all
        ranks."""
        mine: Shard | None = None
        error: Exception | None = None
        with self.written:
            try:
                with saving(self.folder, self.step):
                    mine = write_shard(self.aside, self.rank, parts)
            except Exception as e:
                error = e
            everyone = gather_objects((mine, None if error is None else Told.of(error)), 0, group)
            try:
                on_rank_zero(lambda: self._complete(everyone or []), group)
            except Exception as shared:
                raise shared from error

    def _complete(self, everyone: Sequence[tuple[Shard | None, Told | None]]) -> None:
        for rank, (_, failure) in enumerate(everyone):
            if failure is not None:
                raise failure.error(f"global rank {rank} failed")
        shards = [shard for shard, _ in everyone if shard is not None]
        with saving(self.folder, self.step):
            write_metadata(self.aside, [box for shard in shards for box in shard.written])
            write_common(self.aside, self.common)
            check_files(self.aside, shards)
            (self.aside / RUN_STATE).stat()
            known = {shard.name: shard.entry for shard in shards}
            Manifest.write(self.aside, self.step, self.stage, self.layout, known)
            self.written.close()  # flushes every file and the folder, then renames it
            previous = lineage.latest_step(self.folder)
            lineage.write_latest(self.folder, lineage.name(self.step))
            lineage.prune(self.folder, self.step, previous, self.keep, self.keep_every)


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
    UserError, on every rank, when the folder is not a checkpoint, contains more than data, or belongs to another model.
    DamagedCheckpoint, on every rank, when a file is missing or not as it was written, or a number is not finite: before
    anything is loaded, except that numbers are looked at when they are read; another checkpoint can be loaded then.

    Every file is compared with the manifest by one rank, which reads it: where the layout is the one that wrote the
    checkpoint, each rank its own. Chunks of files that another rank has compared have checksums of their own, which
    are compared too. Checkpoints of versions without manifests have these alone.

    Each rank reads the boxes of its own part. Weights with float32 master weights are computed of these: with the
    distributed optimizer each rank reads its range and gets the others'. Host memory: one tensor at a time.
    """
    path = Path(path)
    host = port.process_groups.host
    stored, mine = _on_every_rank(lambda: _verified(path, host), host)
    checkpoint = _on_every_rank(lambda: _open(path, stored, optimizer_state.is_distributed(optimizer)), host)
    checkpoint.trust(mine)
    names = [] if copies is None else [name for name in copies.names if name in stored.copies]
    wanted = {box.key: box for part in _parts(port, optimizer, copies, names) for box in part.boxes}
    everyone = gather_objects(set(wanted), 0, host)
    on_rank_zero(lambda: _check_keys(checkpoint, set().union(*everyone or []), names), host)
    _on_every_rank(lambda: _check_shapes(checkpoint, wanted.values()), host)
    _on_every_rank(lambda: _read(checkpoint, port, optimizer, scheduler, copies, names), host)
    optimizer_state.update_weights(optimizer, port.chunks)
    return stored.run_state


def not_finite(port: ModelPort, optimizer: MegatronOptimizer, copies: WeightCopies | None) -> str | None:
    """A tensor of what this rank would write of a checkpoint that holds a number that is not finite; None without one.
    Weights apart, it costs what copying the optimizer's state does."""
    names = () if copies is None else copies.names
    for part in own(_parts(port, optimizer, copies, names)):
        if not _is_finite(part.values()):
            return part.boxes[0].key
    return None


def _shards(port: ModelPort) -> dict[int, Sharded]:
    """Megatron's description of each parameter of the model, by the parameter's id; in one order on all data-parallel
    ranks."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    found: dict[int, Sharded] = {}
    for chunk in port.parameters.chunks:
        sharded = chunk.sharded_state_dict(metadata={"singleton_local_shards": False})
        for shard in sharded.values():
            if isinstance(shard, ShardedTensor | ShardedTensorFactory):
                found[id(shard.data)] = shard
    return found


def _parts(
    port: ModelPort, optimizer: MegatronOptimizer, copies: WeightCopies | None, names: Sequence[CopyName]
) -> list[Part]:
    """What this rank holds of a checkpoint's tensors, with the copies `names`. Gives the optimizer its state where it
    has none yet."""
    model = _shards(port)
    layout = port.layout
    dense, expert = port.process_groups.dp_cp.size(), layout.stage_size // layout.expert

    found = []
    for parameter, sharded in (*model.items(), *copies_state.shards(copies, names, model)):
        replicas = dense if getattr(model[parameter].data, "allreduce", True) else expert
        found.append(local(sharded, partial(_flat, sharded.data), sharded.data.dtype, replicas))
    optimizer_state.fill(optimizer)
    return found + optimizer_state.parts(optimizer, model, dense, expert)


def _flat(tensor: Tensor) -> Tensor:
    """FP8 parameters are stored in bfloat16, which every precision can load."""
    return te.values(tensor.detach()).reshape(-1)


# ---------------------------------------------------------------- reading


def _on_every_rank(action: Callable[[], T], group: dist.ProcessGroup) -> T:
    """This rank's result of `action`; a UserError on any rank is raised on all, as a DamagedCheckpoint where it is one.
    Collective."""
    result: list[T] = []
    failure: tuple[bool, str] | None = None
    try:
        result.append(action())
    except UserError as error:
        failure = isinstance(error, DamagedCheckpoint), str(error)
    failure = first_message(failure, group)
    if failure is not None:
        raise (DamagedCheckpoint if failure[0] else UserError)(failure[1])
    return result[0]


def _verified(path: Path, group: dist.ProcessGroup) -> tuple[RunStateFile, list[str]]:
    """The run_state.json of a checkpoint, and the files that this rank has compared with the manifest ([]: none)."""
    stored, manifest = open_checked(path)
    if manifest is None:
        if group.rank() == 0:
            log.warning("%s: %s", path, NO_MANIFEST)
        return stored, []
    mine = manifest.shares(group.size())[group.rank()]
    for problem in manifest.problems(path, mine, lambda _: activity.mark()):
        raise damaged(path, problem)
    return stored, mine


def _open(path: Path, stored: RunStateFile, distributed: bool) -> DistributedCheckpoint:
    """A checkpoint whose optimizer is of this kind."""
    if stored.distributed_optimizer != distributed:
        kind = "an optimizer that is not distributed" if distributed else "the distributed optimizer"
        raise UserError(f"{path} was written with {kind}: set parallelism.distributed_optimizer as it was")
    with damage(path):
        return DistributedCheckpoint(path)


def _check_keys(checkpoint: DistributedCheckpoint, wanted: set[str], copies: Sequence[CopyName]) -> None:
    """UserError unless the checkpoint has the tensors that all ranks together want, and no others."""
    differing = sorted(key for key in wanted ^ checkpoint.tensors.keys() if not copies_state.is_unread(key, copies))
    if differing:
        raise UserError(
            f"{checkpoint.folder} does not fit this model and optimizer: {len(differing)} tensors are in one of them "
            f"only, such as {', '.join(differing[:3])}; resume with the model that wrote it"
        )


def _check_shapes(checkpoint: DistributedCheckpoint, wanted: Iterable[Box]) -> None:
    """UserError unless the checkpoint's tensors have the shapes of the wanted ones, a vocabulary's padding apart."""
    for box in wanted:
        shape, first = checkpoint.tensors[box.key].shape, int(box.padded)
        if len(shape) != len(box.shape) or shape[first:] != box.shape[first:]:
            raise UserError(
                f"{checkpoint.folder} does not fit this model and optimizer: {box.key} has the shape {shape}, and"
                f" {box.shape} in the model; resume with the model that wrote it"
            )


def _read(
    checkpoint: DistributedCheckpoint,
    port: ModelPort,
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    copies: WeightCopies | None,
    names: Sequence[CopyName],
) -> None:
    """Read this rank's part of a checkpoint, without the weights that are computed of it."""
    model, restored = _shards(port), optimizer_state.restored(optimizer)
    targets = [sharded for parameter, sharded in model.items() if parameter not in restored]
    targets += [copy for _, copy in copies_state.shards(copies, names, model)]
    read = partial(_fill, checkpoint)
    with damage(checkpoint.folder):
        for sharded in targets:
            read(boxes(sharded), sharded.data.detach().view(-1))
        optimizer_state.load(optimizer, model, read)
    try:
        common = load_common(checkpoint)
        optimizer_state.set_step_count(optimizer, optimizer_state.stored_step_count(common))
        scheduler.num_steps = int(common["scheduler"]["num_steps"])
    except Exception as error:  # whatever a damaged file raises
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise damaged(checkpoint.folder, f"its step counts cannot be read ({reason:.300})") from error
    scheduler.step(0)


def _fill(checkpoint: DistributedCheckpoint, wanted: Iterable[Box], target: Tensor) -> None:
    """Read boxes into a flat tensor. Rows that the checkpoint does not store, the padding of a vocabulary, are 0.
    DamagedCheckpoint for a number that is not finite."""
    activity.mark()
    for box in wanted:
        into = box.of(target)
        stored = checkpoint.tensors[box.key]
        sizes = box.sizes
        if box.padded and box.offsets[0] + box.sizes[0] > stored.shape[0]:
            into.zero_()
            rows = stored.shape[0] - box.offsets[0]
            if rows <= 0:
                continue
            sizes, into = (rows, *sizes[1:]), into[:rows]
        if into.dtype is stored.dtype and into.device.type == "cpu":
            found = checkpoint.read_box(box.key, box.offsets, sizes, into)
        else:
            found = checkpoint.read_box(box.key, box.offsets, sizes)
            into.copy_(found)
        if not _is_finite(found):
            raise damaged(checkpoint.folder, f"{box.key} holds numbers that are not finite")


def _is_finite(numbers: Tensor) -> bool:
    """One pass over memory: both extremes are NaN if one number is."""
    return not numbers.numel() or bool(torch.isfinite(torch.stack(torch.aminmax(numbers))).all())

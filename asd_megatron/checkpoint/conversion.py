"""Hugging Face folders to Megatron's `torch_dist` checkpoints and back: in one process, without building the model,
one parameter in memory at a time.

    OUT/latest_checkpointed_iteration.txt   `release`: plain Megatron-LM finds the checkpoint with `--load OUT`
    OUT/release/                            .metadata, __0_0.distcp, common.pt, metadata.json: weights alone
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asd_megatron.checkpoint.distcp import DistributedCheckpoint
from asd_megatron.checkpoint.huggingface import MAX_SHARD_BYTES, FolderReader, copy_others, read_config
from asd_megatron.checkpoint.locate import RELEASE, TRACKER
from asd_megatron.checkpoint.safetensors_stream import write_tensors
from asd_megatron.checkpoint.shards import refused_write, write_common
from asd_megatron.checkpoint.stored_model import StoredModel, WeightsName
from asd_megatron.errors import UserError
from asd_megatron.files import atomic_folder, system_reason
from asd_megatron.models.families import shape_of
from asd_megatron.models.loading import Progress, refusal
from asd_megatron.models.stored import Parameter, Place, full_shapes, parameters, unpadded

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of Megatron-LM: with an older version, or none, it would reorder queries, keys and values.
_CHECKPOINT_VERSION = 3.0


def megatron_to_hf(
    checkpoint: DistributedCheckpoint,
    model: str | Path,
    target: str | Path,
    *,
    weights: WeightsName = "live",
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> Path:
    """Write a checkpoint's weights as the folder `target`, which is complete or absent. `model`: the Hugging Face
    folder whose config, tokenizer and other files it gets.

    dtype: None: that of the live weights, to which a moving average is rounded too. UserError, before anything is
    written, when `target` exists or the tensors are not those of `model`; also when the checkpoint turns out damaged,
    or the system refuses to write.
    """
    target = Path(target)
    stored = StoredModel(checkpoint, read_config(model), weights=weights)
    dtype = dtype or stored.dtype
    if dtype is None:
        raise UserError(f"the weights in {checkpoint.folder} have several dtypes: choose one with --dtype")
    if dtype not in DTYPES:
        raise UserError(f"the weights in {checkpoint.folder} have the dtype {dtype}: choose another with --dtype")
    with _writing(target), atomic_folder(target) as folder:
        copy_others(Path(model), folder, dtype)
        write_tensors(stored, dtype, folder, max_shard_bytes, progress)
    return target


def hf_to_megatron(
    source: str | Path,
    target: str | Path,
    *,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write the weights of the Hugging Face folder `source` as the folder `target`, which is complete or absent: a
    Megatron-LM `release` checkpoint without an optimizer, which any layout loads.

    dtype: None: the folder's own. Errors as in `megatron_to_hf`.
    """
    source, target = Path(source), Path(target)
    family, shape = shape_of(read_config(source))
    sizes = unpadded(shape)
    wanted = parameters(family, shape)
    with FolderReader(source) as reader:
        message = refusal(reader, full_shapes(wanted, sizes), family=family.name, tied=shape.tied)
        if message is not None:
            raise UserError(message)
        dtype = dtype or _only_dtype(reader, wanted)
        pieces = [_Piece(parameter, parameter.places(shape)[0], parameter.shape(sizes)) for parameter in wanted]

        def resolve(parameter: Parameter) -> Tensor:
            """The parameter's full Megatron tensor."""
            return parameter.rule.operation.shard([reader[name] for name in parameter.names], 0, 1, sizes)

        with _writing(target), atomic_folder(target) as folder:
            release = folder / RELEASE
            release.mkdir()
            _save_shards(release, _planner(pieces, dtype, resolve, progress))
            write_common(release, {"checkpoint_version": _CHECKPOINT_VERSION})
            (folder / TRACKER).write_text(f"{RELEASE}\n", encoding="utf-8")
    return target


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    """Raise what the operating system refused inside as a UserError."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except (Exception, CheckpointException) as error:
        failures = getattr(error, "failures", None)  # of a CheckpointException: what failed, by rank
        first = next(iter(failures.values()))[0] if failures else error
        if isinstance(first, UserError | KeyboardInterrupt):
            raise first from None
        refusal = refused_write(first, target.parent)
        if refusal is None:
            raise
        reason = system_reason(refusal)
        raise UserError(f"{target} cannot be written ({reason}): free space there, or choose another folder") from error


def _only_dtype(reader: FolderReader, wanted: Iterable[Parameter]) -> torch.dtype:
    """The dtype of all the folder's tensors. Raises UserError where they have several, or one that is not written."""
    found: dict[Any, str] = {}
    for name in (name for parameter in wanted for name in parameter.names):
        found.setdefault(reader[name].dtype, name)
    if len(found) == 1 and next(iter(found)) in DTYPES:
        return next(iter(found))
    listed = ", ".join(f"{name} is {str(dtype).removeprefix('torch.')}" for dtype, name in found.items())
    raise UserError(f"choose the dtype of the checkpoint with --dtype, since in {reader.folder} {listed}")


@dataclass(frozen=True)
class _Piece:
    """A parameter, where it is stored, and the shape of its full tensor."""

    parameter: Parameter
    place: Place
    shape: tuple[int, ...]


def _planner(
    pieces: Sequence[_Piece], dtype: torch.dtype, resolve: Callable[[Parameter], Tensor], progress: Progress | None
) -> Any:
    """A planner of `torch.distributed.checkpoint` whose tensors are made when they are written, one chunk for each
    parameter."""
    from torch.distributed.checkpoint import SavePlan, SavePlanner
    from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
    from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

    total = sum(math.prod(piece.shape) for piece in pieces) * dtype.itemsize

    def item(place: Place, shape: tuple[int, ...]) -> Any:
        offsets = torch.Size((*place.index, *[0] * len(shape)))
        chunk = ChunkStorageMetadata(offsets, torch.Size((*[1] * len(place.index), *shape)))
        data = TensorWriteData(chunk, TensorProperties(dtype=dtype), torch.Size((*place.leading, *shape)))
        return WriteItem(MetadataIndex(place.key, offsets), WriteItemType.SHARD, tensor_data=data)

    class Planner(SavePlanner):
        def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
            self.done = 0
            self.parameters: dict[Any, Parameter] = {}

        def create_local_plan(self) -> Any:
            items = [item(piece.place, piece.shape) for piece in pieces]
            self.parameters = {found.index: piece.parameter for found, piece in zip(items, pieces, strict=True)}
            return SavePlan(items)

        def create_global_plan(self, all_plans: Any) -> Any:
            return create_default_global_save_plan(all_plans)

        def finish_plan(self, new_plan: Any) -> Any:
            return new_plan

        def resolve_data(self, write_item: Any) -> Tensor:
            tensor = resolve(self.parameters[write_item.index]).to(dtype).contiguous()
            self.done += tensor.nbytes
            if progress is not None:
                progress(self.done, total)
            return tensor.view(write_item.tensor_data.chunk.sizes)

    return Planner()


def _save_shards(folder: Path, planner: Any) -> None:
    from torch.distributed.checkpoint import FileSystemWriter, save

    # Nothing is copied ahead: that would be for weights on a GPU.
    writer = FileSystemWriter(folder, thread_count=1, per_thread_copy_ahead=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that one process writes, as intended; and PyTorch's of its own code
        save({}, storage_writer=writer, planner=planner, no_dist=True)

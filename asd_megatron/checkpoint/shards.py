"""The files of a checkpoint's tensors: each rank writes one, and global rank 0 says in `.metadata` what is where.

    __R_0.distcp    the boxes that rank R writes, one after the other, each in `torch.save`'s form (`chunk_writer`)
    .metadata       shape and dtype of each tensor, its boxes, and where each box is: file, first byte, length
    common.pt       what is no tensor

This is PyTorch's and Megatron's `torch_dist` format. Their own writers gather plans before and write in forked or other
threads' workers, whose errors get lost; here a rank writes its file alone, without any collective.
"""

from __future__ import annotations

import errno
import math
import os
import pickle
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from asd_megatron.checkpoint.chunk_writer import write_tensor
from asd_megatron.checkpoint.distcp import size_text
from asd_megatron.checkpoint.manifest import ChecksumWriter, FileEntry
from asd_megatron.checkpoint.parts import Box, Part
from asd_megatron.distributed import activity
from asd_megatron.errors import UserError
from asd_megatron.files import remedy, system_reason, write_json

_TORCH_SAVE = ("inline_container", "iostream error")  # in what `torch.save` raises when the system refuses a write
_TRIAL_BYTES = 1 << 20


@contextmanager
def saving(folder: Path, step: int) -> Iterator[None]:
    """Raise what the operating system refused inside as a UserError."""
    try:
        yield
    except Exception as error:
        refusal = refused_write(error, folder)
        if refusal is None:
            raise
        raise UserError(
            f"the checkpoint of step {step} cannot be saved in {folder} ({system_reason(refusal)}): {remedy(refusal)}"
        ) from error


def refused_write(error: BaseException, folder: Path) -> OSError | None:
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
    """The operating system's error for a file of 1 MiB in `folder`; None if it can be written."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_TRIAL_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error
    return None


@dataclass(frozen=True)
class Written:
    """A box in a file: its dtype, and where it is."""

    box: Box
    dtype: torch.dtype
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class Shard:
    """A rank's file: its name, bytes and checksum, and the boxes in it."""

    name: str
    entry: FileEntry
    written: list[Written]


def write_shard(folder: Path, rank: int, parts: Iterable[Part]) -> Shard:
    """Write `parts` as this rank's file in `folder`. Memory: one box, where it is on a GPU. Raises what the system
    raises."""
    name = f"__{rank}_0.distcp"
    written = []
    with (folder / name).open("wb") as opened:
        file = ChecksumWriter(opened)
        for part in parts:
            activity.mark()
            values = part.values()
            for box in part.boxes:
                start = file.tell()
                write_tensor(box.of(values).cpu(), file)
                written.append(Written(box, part.dtype, name, start, file.tell() - start))
        opened.flush()
        os.fsync(opened.fileno())
    return Shard(name, file.entry, written)


def write_metadata(folder: Path, written: Sequence[Written]) -> None:
    """Write `.metadata` about all ranks' boxes. RuntimeError unless they make up complete tensors."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    tensors: dict[str, list[Written]] = {}
    for found in written:
        tensors.setdefault(found.box.key, []).append(found)
    described: dict[str, Any] = {}
    where: dict[Any, Any] = {}
    for key, parts in tensors.items():
        kinds = {(part.box.shape, part.dtype) for part in parts}
        numbers = sum(part.box.numel for part in parts)
        shape, dtype = next(iter(kinds))
        if len(kinds) != 1 or numbers != math.prod(shape):
            raise RuntimeError(f"the ranks hold {numbers} numbers of {key}, of {sorted(map(str, kinds))}")
        chunks = [ChunkStorageMetadata(torch.Size(p.box.offsets), torch.Size(p.box.sizes)) for p in parts]
        described[key] = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), chunks)
        for part, chunk in zip(parts, chunks, strict=True):
            where[MetadataIndex(key, chunk.offsets)] = _StorageInfo(part.file, part.start, part.length)
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata(described, storage_data=where)))


def check_files(folder: Path, shards: Iterable[Shard]) -> None:
    """OSError unless the ranks' files have the bytes that were written: somebody may have cleared the folder
    meanwhile."""
    for shard in shards:
        there = (folder / shard.name).stat().st_size
        if there != shard.entry.bytes:
            raise OSError(f"{shard.name} has {there} bytes there, and {shard.entry.bytes} were written")


def check_space(folder: Path, needed: int) -> None:
    """OSError when the file system of `folder` has less space than a checkpoint's `needed` bytes. Nothing of it is then
    written, which leaves what there is to the run's other files. File systems that do not say how large they are pass.
    """
    usage = shutil.disk_usage(folder)
    if usage.total > 0 and usage.free < needed:
        raise OSError(
            errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {size_text(usage.free)} are free, {size_text(needed)} needed"
        )


def write_common(folder: Path, content: dict[str, Any]) -> None:
    """Write what Megatron reads beside the tensors: the format, that layers and experts are stacked, and `content`."""
    described = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    torch.save({**content, "content_metadata": described}, folder / "common.pt")
    write_json(folder / "metadata.json", {"sharded_backend": "torch_dist", "sharded_backend_version": 1})

"""A chunk of a `torch_dist` checkpoint as a view of its mapped file, with its checksum compared.

A chunk is what `torch.save` writes for one tensor, a ZIP archive:

    archive/data.pkl    a pickle: shape, strides and the name of the storage
    archive/data/0      the numbers, not compressed

PyTorch's own reader copies the numbers several times and never looks at the checksums. Here nothing is copied, and the
pickle is read without looking up a class. Chunks of any other form (compressed by an extension, a view of a larger
storage) are left to PyTorch.
"""

from __future__ import annotations

import io
import math
import mmap
import pickle
import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import torch
from torch import Tensor

from asd_megatron.checkpoint.safety import unpickle

STORAGES = {
    "FloatStorage": torch.float32,
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
    "DoubleStorage": torch.float64,
}
"""The dtypes of chunks by the name of their storage's class."""
_LOCAL_HEADER = 30  # bytes of an entry before its name
_MOST_PICKLE = 1 << 16


class _Described(NamedTuple):
    """A pickled tensor."""

    storage: tuple[Any, ...]
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Reader(pickle.Unpickler):
    """Knows how a plain tensor is pickled, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, strides, *_: _Described(storage, offset, shape, strides)
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        raise pickle.UnpicklingError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        return pid


class _Mapped(mmap.mmap):
    """A part of a file, as a file that zipfile reads."""

    def seekable(self) -> bool:
        return True


def mapped_chunk(
    path: Path, start: int, length: int, shape: tuple[int, ...], dtype: torch.dtype, *, check: bool
) -> Tensor | None:
    """The bytes of the tensor in `length` bytes of a file, backed by the file: uint8 of `byte_shape`. None for a chunk
    of another form, shape or dtype.

    They may begin anywhere in memory: no view of them as numbers, whose loops may count on their alignment. check:
    compare the checksum of the numbers. Raises BadZipFile where one is wrong or the archive is damaged. A chunk whose
    writer left out all checksums is of another form.
    """
    before = start % mmap.ALLOCATIONGRANULARITY  # bytes of other chunks, which an archive may have before it
    with path.open("rb") as file:
        # Copied on write, which never happens: torch wants memory that it may write to.
        part = _Mapped(file.fileno(), before + length, access=mmap.ACCESS_COPY, offset=start - before)
    with zipfile.ZipFile(cast(IO[bytes], part)) as archive:
        entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
        description, numbers = entries.get("data.pkl"), entries.get("data/0")
        if description is None or numbers is None or description.file_size > _MOST_PICKLE:
            return None
        if not any(entry.CRC for entry in entries.values()):
            return None
        if not _is_plain(archive.read(description), shape, dtype):
            return None
    first = _first_byte(part, numbers)
    size = math.prod(shape) * dtype.itemsize
    if numbers.compress_type != zipfile.ZIP_STORED or numbers.file_size != size or first + size > len(part):
        raise zipfile.BadZipFile("its numbers are not where they should be")
    data = torch.frombuffer(part, dtype=torch.uint8, count=size, offset=first)
    if check and zlib.crc32(data.numpy().data) != numbers.CRC:
        raise zipfile.BadZipFile("the checksum of its numbers is wrong")
    return data.view(byte_shape(shape, dtype))


def byte_shape(shape: Sequence[int], dtype: torch.dtype) -> tuple[int, ...]:
    """The shape of a tensor's bytes: [4, 16] numbers of two bytes are [4, 32]."""
    return (*shape[:-1], shape[-1] * dtype.itemsize) if shape else (dtype.itemsize,)


def _is_plain(data: bytes, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether a pickle is that of a contiguous tensor of this shape and dtype that is its complete storage."""
    try:
        found = unpickle(_Reader(io.BytesIO(data)), len(data))
    except Exception:  # of something else, or hostile: PyTorch's reader of weights decides
        return False
    if not isinstance(found, _Described):
        return False
    wanted = ("storage", dtype, "0", math.prod(shape))
    storage = tuple(found.storage)
    strides = torch.empty(shape, device="meta").stride()
    return (
        (*storage[:3], storage[-1]) == wanted
        and found.offset == 0
        and tuple(found.shape) == shape
        and tuple(found.strides) == strides
    )


def _first_byte(part: mmap.mmap, entry: zipfile.ZipInfo) -> int:
    """Where an entry's data begin: after its local header, a name and an extra field of their own lengths."""
    name, extra = struct.unpack_from("<HH", part, entry.header_offset + _LOCAL_HEADER - 4)
    return int(entry.header_offset + _LOCAL_HEADER + name + extra)

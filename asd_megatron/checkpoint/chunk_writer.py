"""A tensor in the form of `torch.save` (see `mapped_chunk`), written for a thread beside the one that trains.

The checksum and the write are single calls that release Python's interpreter lock, the numbers are not copied, and a
write that the system refuses is an OSError. `torch.save` hands the numbers to Python in many pieces.
"""

from __future__ import annotations

import io
import math
import pickle
import sys
import zipfile
from collections import OrderedDict
from typing import IO, Any, Protocol, cast

import torch
from torch import Tensor

from asd_megatron.checkpoint.mapped_chunk import STORAGES

_NAME = "archive"
_CLASSES = {dtype: getattr(torch, name) for name, dtype in STORAGES.items()}


def write_tensor(values: Tensor, file: Writer) -> None:
    """Write a contiguous tensor of a dtype of `STORAGES` that is in host memory at the end of `file`, front to back."""
    numbers = values.detach().reshape(-1).view(torch.uint8).numpy()
    with zipfile.ZipFile(cast(IO[bytes], _End(file)), "w", zipfile.ZIP_STORED) as archive:
        for name, data in (
            ("data.pkl", _pickled(values)),
            ("byteorder", sys.byteorder),
            ("data/0", numbers.data),
            ("version", "3\n"),
        ):
            archive.writestr(zipfile.ZipInfo(f"{_NAME}/{name}"), data)  # without a date: equal tensors are equal bytes


class Writer(Protocol):
    """A file that is written front to back."""

    def write(self, data: Any, /) -> int: ...

    def flush(self) -> None: ...


class _End:
    """What is written at the end of a file, as a file of its own. It has no place, so that the archive is written as a
    stream: the checksum of the numbers comes after them, not before."""

    def __init__(self, file: Writer) -> None:
        self._file = file

    def write(self, data: Any) -> int:
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


class _Storage:
    """Stands for the storage of a tensor."""


class _Contiguous:
    """Is pickled as a contiguous tensor of this shape."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def __reduce__(self) -> tuple[Any, ...]:
        strides = torch.empty(self.shape, device="meta").stride()
        return torch._utils._rebuild_tensor_v2, (_Storage(), 0, self.shape, strides, False, OrderedDict())


def _pickled(values: Tensor) -> bytes:
    class Pickler(pickle.Pickler):
        def persistent_id(self, found: Any) -> Any:
            if isinstance(found, _Storage):
                return "storage", _CLASSES[values.dtype], "0", "cpu", math.prod(values.shape)
            return None

    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump(_Contiguous(tuple(values.shape)))
    return buffer.getvalue()

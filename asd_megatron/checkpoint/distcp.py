"""The tensors of a `torch_dist` checkpoint, read in one process without the model that wrote them.

    .metadata        each tensor's shape, dtype and chunks, and where each chunk is: file, first byte, length
    __R_T.distcp     the chunks that rank R wrote, one after the other

A chunk is a box of its tensor. A tensor [4, 64, 16] of four stacked layers, cut by tensor parallelism 2, has eight:

    offsets (0, 0, 0)  sizes (1, 32, 16)        offsets (0, 32, 0)  sizes (1, 32, 16)        offsets (1, 0, 0) ...

Any region is put together from the chunks that it touches, so the layout that wrote them does not matter.
"""

from __future__ import annotations

import math
import os
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asd_megatron.checkpoint.mapped_chunk import byte_shape, mapped_chunk
from asd_megatron.checkpoint.safety import read_metadata, weights_only
from asd_megatron.errors import UserError, plural
from asd_megatron.files import user_error

SHOWN = 8  # damaged files that a message lists
_MOST = 1 << 48  # elements of a tensor: more is damage
Overlap = tuple[list[int], list[int]]
"""The first element of what a chunk and a wanted box have in common, and its sizes."""


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor: its first element, its sizes, and where its bytes are."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int
    transformed: bool = False  # by an extension of the writer, compressed for example


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's description. `chunks` are ordered by their offsets."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Of its elements; the files need a little more."""
        return self.numel * self.dtype.itemsize

    @cached_property
    def cuts(self) -> tuple[int, ...]:
        """For each axis, in how many different places chunks begin."""
        return tuple(len({chunk.offsets[axis] for chunk in self.chunks}) for axis in range(len(self.shape)))

    @cached_property
    def _offsets(self) -> list[tuple[int, ...]]:
        return [chunk.offsets for chunk in self.chunks]

    @cached_property
    def _longest(self) -> tuple[int, ...]:
        return tuple(max((chunk.sizes[axis] for chunk in self.chunks), default=0) for axis in range(len(self.shape)))

    def touching(self, start: Sequence[int], sizes: Sequence[int]) -> list[Chunk]:
        """The chunks that share elements with the box at `start` of `sizes`.

        Where no chunk has more than one layer and one expert, those of [layer, expert] are found by their first two
        offsets: a tensor of many experts has thousands of chunks.
        """
        if not self.shape:
            return list(self.chunks)
        single = 0
        while single < len(self.shape) - 1 and self._longest[single] == sizes[single] == 1:
            single += 1
        known = tuple(start[:single])
        first = bisect_left(self._offsets, (*known, start[single] - self._longest[single] + 1))
        last = bisect_left(self._offsets, (*known, start[single] + sizes[single]))
        return [c for c in self.chunks[first:last] if all(length > 0 for length in _overlap(c, start, sizes)[1])]


class DistributedCheckpoint:
    """A folder with `.metadata` and `.distcp` files, opened for reading.

    Attributes:
        folder: the folder.
        tensors: descriptions by key.
        objects: keys of entries that are no tensors (extra states, random states); they are never unpickled.
        files: bytes of each file of chunks, by name.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Raises UserError for a folder that is no such checkpoint, unsafe or damaged metadata, and missing or torn
        files (all of them by name)."""
        self.folder = Path(folder)
        metadata = read_metadata(self.folder)
        try:
            self.tensors, self.objects = _described(metadata)
            self._metadata = metadata
        except Exception as error:  # whatever nonsense a pickle of the right classes may hold
            raise UserError(
                f"{self.folder / '.metadata'} is damaged ({error or type(error).__name__}): copy the checkpoint again"
            ) from error
        self.files = self._checked_files()
        self._checked: set[Chunk] = set()  # whose checksum is right
        self._trusted: frozenset[str] = frozenset()

    def trust(self, files: Iterable[str]) -> None:
        """The checksums of chunks in these files need not be compared: the complete files have been checked."""
        self._trusted = frozenset(files)

    def _checked_files(self) -> dict[str, int]:
        ends: dict[str, int] = {}
        for tensor in self.tensors.values():
            for chunk in tensor.chunks:
                ends[chunk.file] = max(ends.get(chunk.file, 0), chunk.start + chunk.length)
        found: dict[str, int] = {}
        problems = []
        for name, end in sorted(ends.items()):
            path = self.folder / name
            with user_error(f"{path} cannot be read", "check the permissions of the checkpoint"):
                found[name] = path.stat().st_size if path.is_file() else -1
            if found[name] < 0:
                problems.append(f"{name} is missing")
            elif found[name] < end:
                problems.append(f"{name} has {found[name]} bytes and should have at least {end}")
        if problems:
            more = f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
            raise UserError(
                f"the checkpoint {self.folder} is incomplete: {', '.join(problems[:SHOWN])}{more}; copy it again, or "
                "take another one"
            )
        return found

    def read(self, key: str, index: Sequence[int] = (), rows: slice = slice(None)) -> Tensor:
        """`tensor[index][rows]` of a stored tensor, on the CPU, in its own dtype. Errors: see `read_box`."""
        rest = list(self.tensors[key].shape[len(index) :])
        first = [0] * len(rest)
        if rest:
            begin, end, _ = rows.indices(rest[0])
            first[0], rest[0] = begin, max(end - begin, 0)
        return self.read_box(key, (*index, *first), (*[1] * len(index), *rest)).reshape(rest)

    def read_box(self, key: str, start: Sequence[int], sizes: Sequence[int], into: Tensor | None = None) -> Tensor:
        """The box at `start` of `sizes` of a stored tensor, on the CPU, in its own dtype; reads only chunks that it
        touches.

        into: memory for it, contiguous, of that dtype. Memory: the result. (Chunks of unusual form are copied as a
        whole.) Raises UserError for chunks that cannot be read or have a wrong checksum, and for a box that they do
        not cover exactly once.
        """
        tensor = self.tensors[key]
        result = torch.empty(tuple(sizes), dtype=tensor.dtype) if into is None else into
        boxes = {chunk: _overlap(chunk, start, sizes) for chunk in tensor.touching(start, sizes)}
        self._check_cover(tensor, start, sizes, list(boxes.values()))
        numbers = result.reshape(-1).view(torch.uint8).view(byte_shape(sizes, tensor.dtype))
        self._assemble(numbers, tensor, start, boxes)
        return result

    def object_bytes(self, key: str, most: int) -> bytes:
        """The first `most` bytes of an entry that is no tensor; empty when it cannot be read."""
        from torch.distributed.checkpoint.metadata import MetadataIndex

        try:
            stored = self._metadata.storage_data[MetadataIndex(key)]
            with (self.folder / _file(stored.relative_path)).open("rb") as file:
                file.seek(stored.offset)
                return file.read(min(stored.length, most))
        except Exception:  # a damaged description
            return b""

    def _check_cover(
        self, tensor: StoredTensor, start: Sequence[int], sizes: Sequence[int], boxes: list[Overlap]
    ) -> None:
        volume = sum(math.prod(lengths) for _, lengths in boxes)
        if volume != math.prod(sizes) or _any_overlap(boxes):
            named = max((axis + 1 for axis, first in enumerate(start) if first), default=0)  # without zeros at the end
            place = f"{tensor.key}{list(start[:named]) or ''}"
            raise UserError(
                f"the chunks of {place} in {self.folder} hold {volume} elements of {math.prod(sizes)}, or some twice: "
                "the checkpoint is damaged, take another one"
            )

    def _assemble(
        self, result: Tensor, tensor: StoredTensor, start: Sequence[int], boxes: Mapping[Chunk, Overlap]
    ) -> None:
        """Fill the bytes of the box at `start`, of which each chunk holds a part."""
        width = tensor.dtype.itemsize
        for chunk, (first, lengths) in boxes.items():
            try:
                part = self._chunk(tensor, chunk)
            except Exception as error:  # what PyTorch raises for bytes that are no tensor
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                raise UserError(
                    f"{tensor.key} cannot be read from {chunk.file} in {self.folder} ({reason:.300}): the checkpoint is"
                    " damaged, copy it again"
                ) from error
            _box(result, first, start, lengths, width).copy_(_box(part, first, chunk.offsets, lengths, width))

    def _chunk(self, tensor: StoredTensor, chunk: Chunk) -> Tensor:
        """A chunk's bytes. Raises anything where they are no tensor."""
        if not chunk.transformed:
            path, check = self.folder / chunk.file, chunk.file not in self._trusted and chunk not in self._checked
            mapped = mapped_chunk(path, chunk.start, chunk.length, chunk.sizes, tensor.dtype, check=check)
            if mapped is not None:
                self._checked.add(chunk)
                return mapped
        found = self._read_by_torch(tensor, chunk)
        return found.reshape(-1).view(torch.uint8).view(byte_shape(chunk.sizes, tensor.dtype))

    def _read_by_torch(self, tensor: StoredTensor, chunk: Chunk) -> Tensor:
        from torch.distributed.checkpoint import FileSystemReader, LoadPlan
        from torch.distributed.checkpoint.metadata import MetadataIndex
        from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

        result = torch.empty(chunk.sizes, dtype=tensor.dtype)
        nothing = torch.Size([0] * len(chunk.sizes))
        item = ReadItem(
            type=LoadItemType.TENSOR,
            dest_index=MetadataIndex(tensor.key),
            dest_offsets=nothing,
            storage_index=MetadataIndex(tensor.key, torch.Size(chunk.offsets)),
            storage_offsets=nothing,
            lengths=torch.Size(chunk.sizes),
        )
        reader = FileSystemReader(self.folder)
        with weights_only():
            reader.set_up_storage_reader(self._metadata, is_coordinator=True)
            reader.read_data(LoadPlan([item]), _filler(result)).wait()
        return result


def _box(data: Tensor, first: Sequence[int], start: Sequence[int], lengths: Sequence[int], width: int) -> Tensor:
    """The bytes of a box (`first`, `lengths`; in the tensor) in those of the part at `start`, as a view."""
    for axis, (a, b, length) in enumerate(zip(first, start, lengths, strict=True)):
        factor = width if axis == len(lengths) - 1 else 1
        data = data.narrow(axis, (a - b) * factor, length * factor)
    return data


def _filler(result: Tensor) -> Any:
    from torch.distributed.checkpoint import DefaultLoadPlanner

    class Filler(DefaultLoadPlanner):
        """Puts what is read into `result`."""

        def resolve_tensor(self, read_item: Any) -> Tensor:
            return result

        def commit_tensor(self, read_item: Any, tensor: Tensor) -> None:
            pass

    return Filler()


def _overlap(chunk: Chunk, start: Sequence[int], sizes: Sequence[int]) -> Overlap:
    """The common box of a chunk and the box at `start`: its first element and its sizes (not positive: none)."""
    first = [max(a, b) for a, b in zip(chunk.offsets, start, strict=True)]
    ends = [min(a + n, b + m) for a, n, b, m in zip(chunk.offsets, chunk.sizes, start, sizes, strict=True)]
    return first, [end - begin for end, begin in zip(ends, first, strict=True)]


def _any_overlap(boxes: list[Overlap]) -> bool:
    """Whether two of the boxes share an element."""
    ordered = sorted(boxes)
    for number, (first, lengths) in enumerate(ordered):
        for other, size in ordered[number + 1 :]:
            if first and other[0] >= first[0] + lengths[0]:
                break
            if all(a < b + m and b < a + n for a, n, b, m in zip(first, lengths, other, size, strict=True)):
                return True
    return False


def _described(metadata: Any) -> tuple[dict[str, StoredTensor], tuple[str, ...]]:
    """The tensors and the keys of other objects. Raises some exception for metadata that does not make sense."""
    from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

    if not isinstance(metadata, Metadata):
        raise ValueError("it holds no checkpoint metadata")
    where = metadata.storage_data
    tensors: dict[str, StoredTensor] = {}
    objects = []
    for key, entry in metadata.state_dict_metadata.items():
        if not isinstance(key, str):
            raise ValueError(f"the key {key!r:.80} is no text")
        if not isinstance(entry, TensorStorageMetadata):
            objects.append(key)
            continue
        shape = _sizes(entry.size, key)
        if math.prod(shape) > _MOST or not isinstance(entry.properties.dtype, torch.dtype):
            raise ValueError(f"{key} has the shape {shape} and the type {entry.properties.dtype!r:.40}")
        chunks = []
        for chunk in entry.chunks:
            offsets, sizes = _sizes(chunk.offsets, key), _sizes(chunk.sizes, key)
            if len(offsets) != len(shape) or any(a + n > m for a, n, m in zip(offsets, sizes, shape, strict=True)):
                raise ValueError(f"a chunk of {key} lies outside the tensor: {offsets} {sizes} of {shape}")
            stored = where.get(MetadataIndex(key, chunk.offsets))
            if stored is None:
                raise ValueError(f"it does not say where the chunk of {key} at {offsets} is")
            start, length = _sizes((stored.offset, stored.length), key)
            transformed = bool(getattr(stored, "transform_descriptors", None))
            chunks.append(Chunk(offsets, sizes, _file(stored.relative_path), start, length, transformed))
        chunks.sort(key=lambda chunk: chunk.offsets)
        tensors[key] = StoredTensor(key, shape, entry.properties.dtype, tuple(chunks))
    if not tensors:
        raise ValueError("it names no tensors")
    return tensors, tuple(objects)


def _sizes(values: Any, key: str) -> tuple[int, ...]:
    found = tuple(values)
    if not all(type(value) is int and 0 <= value < _MOST for value in found):
        raise ValueError(f"{key} has the sizes {found!r:.80}")
    return found


def _file(name: Any) -> str:
    """The name of a file directly in the folder."""
    if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name:
        raise ValueError(f"it names the file {name!r:.80}, which is not in the folder")
    return name


def size_text(number: int) -> str:
    """1234567 as `1.2 MB`."""
    value = float(number)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.1f} {unit}" if unit != "bytes" else plural(number, "byte")
        value /= 1000
    return f"{value:.2f} TB"

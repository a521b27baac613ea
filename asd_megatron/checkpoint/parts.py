"""What a rank holds of a checkpoint's tensors: boxes of them, and the numbers in each.

The distributed optimizer gives each data-parallel rank a flat range of a parameter, whatever its rows. The range
[3, 17) of a parameter [4, 5] is three boxes:

    . . . a a       a   (0, 3), sizes (1, 2)
    b b b b b       b   (1, 0), sizes (2, 5)
    b b b b b
    c c . . .       c   (3, 0), sizes (1, 2)

A state that is stored as boxes of complete tensors needs no gather, each rank writes what it has, and any layout can
read it: its ranks put the boxes that they need together from those that are stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

Sharded: TypeAlias = "ShardedTensor | ShardedTensorFactory"
"""Megatron's description of a local tensor: where in which stored tensor it is."""


@dataclass(frozen=True)
class Box:
    """A box of a stored tensor.

    Attributes:
        key, shape: of the stored tensor.
        offsets, sizes: of the box in it.
        start: where its numbers begin in the rank's flat range.
        padded: whether the stored tensor may have more or fewer rows at its end (the padding of a vocabulary).
    """

    key: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    start: int
    padded: bool

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)

    def of(self, flat: Tensor) -> Tensor:
        """Its numbers in those of the rank's range, as a view of `sizes`."""
        return flat[self.start : self.start + self.numel].view(self.sizes)


@dataclass(frozen=True)
class Part:
    """One local tensor or a flat range of it, as a checkpoint stores it.

    Attributes:
        boxes: that it consists of, in the order of its numbers.
        dtype: of its numbers, as they are stored.
        values: gives its numbers, flat, possibly as a new tensor.
        writer: whether this rank is one of those that may write it.
        replica, replicas: which of how many data-parallel ranks with equal numbers this one is.
    """

    boxes: tuple[Box, ...]
    dtype: torch.dtype
    values: Callable[[], Tensor]
    writer: bool
    replica: int = 0
    replicas: int = 1

    @property
    def bytes(self) -> int:
        return sum(box.numel for box in self.boxes) * self.dtype.itemsize


def local(sharded: Sharded, values: Callable[[], Tensor], dtype: torch.dtype, replicas: int) -> Part:
    """A local tensor that `replicas` data-parallel ranks have."""
    model_parallel, replica = _replica(sharded)
    return Part(tuple(boxes(sharded)), dtype, values, model_parallel == (0, 0), replica, replicas)


def local_range(
    sharded: Sharded, begin: int, end: int, values: Callable[[], Tensor], dtype: torch.dtype, key: str
) -> Part:
    """The numbers [begin, end) of a tensor like the local one, stored under `key`; no other data-parallel rank has
    them."""
    return Part(tuple(boxes(sharded, begin, end, key)), dtype, values, _replica(sharded)[0] == (0, 0))


def own(parts: Iterable[Part]) -> list[Part]:
    """Those of a rank's parts that it writes. What several data-parallel ranks have is spread over them by size; they
    decide alike, because they list the same parts in the same order."""
    candidates = [part for part in parts if part.writer]
    loads: dict[int, list[int]] = {}
    chosen = [part for part in candidates if part.replicas == 1]
    for part in sorted((p for p in candidates if p.replicas > 1), key=lambda part: -part.bytes):
        load = loads.setdefault(part.replicas, [0] * part.replicas)
        owner = load.index(min(load))
        load[owner] += part.bytes
        if owner == part.replica:
            chosen.append(part)
    return chosen


def _replica(sharded: Sharded) -> tuple[tuple[int, int], int]:
    """The pipeline and tensor-parallel parts of Megatron's replica id, and the data-parallel one."""
    found: Any = sharded.replica_id
    pipeline, tensor, data = found
    return (int(pipeline), int(tensor)), int(data)


def boxes(sharded: Sharded, begin: int = 0, end: int | None = None, key: str | None = None) -> Iterator[Box]:
    """The boxes of the numbers [begin, end) of a local tensor. key: of the stored tensor, where it is another one of
    the same shape."""
    assert sharded.data is not None
    end = math.prod(sharded.data.shape) if end is None else end
    if key is not None:
        sharded = replace(sharded, key=key)  # a gated projection's factory makes the keys of its halves of it
    for first, piece in _pieces(sharded):
        size = math.prod(piece.local_shape)
        start, stop = max(begin, first), min(end, first + size)
        if start >= stop:
            continue
        leading = (1,) * piece.prepend_axis_num
        for offsets, sizes in rectangles(piece.local_shape, start - first, stop - first):
            inside = (*[0] * piece.prepend_axis_num, *offsets)
            yield Box(
                piece.key,
                tuple(piece.global_shape),
                tuple(a + b for a, b in zip(piece.global_offset, inside, strict=True)),
                (*leading, *sizes),
                start - begin,
                piece.allow_shape_mismatch,
            )
            start += math.prod(sizes)


def _pieces(sharded: Sharded) -> Iterator[tuple[int, ShardedTensor]]:
    """The stored pieces of a local tensor, and where each begins among its numbers. A gated projection has two: its
    halves are apart in the stored tensor."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    if isinstance(sharded, ShardedTensor):
        yield 0, sharded
        return
    outline: Any = torch.empty(sharded.data.shape, dtype=torch.uint8, device="meta")
    for piece in nested_values(replace(sharded, data=outline).build()):
        if not (piece.data.is_contiguous() and piece.data._base is outline):
            raise NotImplementedError(f"the pieces of {sharded.key} are not ranges of its numbers")
        yield int(piece.data.storage_offset()), piece


def rectangles(shape: tuple[int, ...], begin: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The numbers [begin, end) of a tensor in row-major order as boxes (offsets, sizes), in that order: part of a first
    row, complete rows, part of a last row, and the same within these rows."""
    if begin >= end:
        return
    if not shape:
        yield (), ()
        return
    row = math.prod(shape[1:])
    first, last = begin // row, end // row
    if begin % row:
        stop = min(end, (first + 1) * row)
        for offsets, sizes in rectangles(shape[1:], begin - first * row, stop - first * row):
            yield (first, *offsets), (1, *sizes)
        first += 1
    if first < last:
        yield (first, *[0] * (len(shape) - 1)), (last - first, *shape[1:])
    if first <= last and end % row:
        for offsets, sizes in rectangles(shape[1:], 0, end - last * row):
            yield (last, *offsets), (1, *sizes)

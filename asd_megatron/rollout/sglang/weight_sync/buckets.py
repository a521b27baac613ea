"""Tensors packed into flat buckets of bounded size, the form of SGLang's `flattened_bucket`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from asd_megatron.models.export import Block
from asd_megatron.rollout.sglang.weight_sync.protocol import NamedTensors

BUCKET_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Contents:
    """What a bucket holds, tensor after tensor."""

    names: list[str] = field(default_factory=list)
    dtypes: list[torch.dtype] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(dtype.itemsize * torch.Size(s).numel() for dtype, s in zip(self.dtypes, self.shapes, strict=True))

    def description(self) -> dict[str, list]:
        """`names`, `dtypes` and `shapes` of SGLang's requests."""
        dtypes = [str(dtype).removeprefix("torch.") for dtype in self.dtypes]
        return {"names": self.names, "dtypes": dtypes, "shapes": [list(shape) for shape in self.shapes]}

    def add(self, names: Sequence[str], dtype: torch.dtype, shape: Sequence[int]) -> None:
        """Tensors of one dtype and shape."""
        self.names.extend(names)
        self.dtypes.extend([dtype] * len(names))
        self.shapes.extend([tuple(shape)] * len(names))


@dataclass
class Bucket:
    """Consecutive tensors, byte after byte in `data` (uint8)."""

    data: Tensor
    contents: Contents = field(default_factory=Contents)


class Slots:
    """Double buffering: the memory of two buckets of `bucket_bytes`, given out in turn, so that two buckets are valid
    at a time. A larger bucket has memory of its own."""

    def __init__(self, bucket_bytes: int) -> None:
        self._bucket_bytes = bucket_bytes
        self._slots: list[Tensor | None] = [None, None]
        self._next = 0

    def take(self, size: int, device: torch.device) -> Tensor:
        """Memory of at least `size` bytes."""
        index, self._next = self._next, 1 - self._next
        slot, self._slots[index] = self._slots[index], None
        if slot is None or slot.numel() < size:
            del slot  # frees the old memory before the new is allocated
            slot = torch.empty(max(self._bucket_bytes, size), dtype=torch.uint8, device=device)
        if slot.numel() <= self._bucket_bytes:
            self._slots[index] = slot
        return slot


def fill(blocks: Sequence[Block], slots: Slots, device: torch.device) -> tuple[Bucket, list[tuple[Block, Tensor]]]:
    """All `blocks` in one bucket on `device`, and where each is in it: [tensors, *shape], in the order of `blocks`.

    In the bucket, blocks of larger elements come first, so that each one is aligned.
    """
    size = sum(block.nbytes for block in blocks)
    bucket = Bucket(slots.take(size, device)[:size])
    places: dict[int, Tensor] = {}
    used = 0
    for number, block in sorted(enumerate(blocks), key=lambda item: -item[1].dtype.itemsize):
        flat = bucket.data[used : used + block.nbytes].view(block.dtype)
        targets = [t.view(s.shape) for t, s in zip(flat.view(len(block.sources), -1), block.sources, strict=True)]
        torch._foreach_copy_(targets, [source.detach() for source in block.sources])
        bucket.contents.add(block.names, block.dtype, block.shape)
        places[number] = flat.view(len(block.names), *block.shape)
        used += block.nbytes
    return bucket, [(block, places[number]) for number, block in enumerate(blocks)]


def pack(tensors: NamedTensors, bucket_bytes: int, device: torch.device | None = None) -> Iterator[Bucket]:
    """Buckets of at most `bucket_bytes` on `device` (None: the tensors'), `fill`ed with consecutive tensors; a larger
    tensor is a bucket of its own. Two buckets are valid at a time (`Slots`)."""
    slots = Slots(bucket_bytes)
    for blocks in _batches(tensors, bucket_bytes):
        yield fill(blocks, slots, device or blocks[0].sources[0].device)[0]


def _batches(tensors: NamedTensors, bucket_bytes: int) -> Iterator[list[Block]]:
    blocks: list[Block] = []
    used = 0
    for name, tensor in tensors:
        if blocks and used + tensor.nbytes > bucket_bytes:
            yield blocks
            blocks, used = [], 0
        blocks.append(Block.of(name, tensor))
        used += tensor.nbytes
    if blocks:
        yield blocks

"""Tensors packed into flat buckets of bounded size, the form of SGLang's `flattened_bucket`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from asd_megatron.rollout.sglang.weight_sync.protocol import NamedTensors

BUCKET_BYTES = 256 * 2**20


@dataclass
class Bucket:
    """Consecutive tensors, byte after byte in `data` (uint8)."""

    data: Tensor
    names: list[str] = field(default_factory=list)
    dtypes: list[torch.dtype] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)

    def description(self) -> dict[str, list]:
        """`names`, `dtypes` and `shapes` of SGLang's requests."""
        dtypes = [str(dtype).removeprefix("torch.") for dtype in self.dtypes]
        return {"names": self.names, "dtypes": dtypes, "shapes": [list(shape) for shape in self.shapes]}


def pack(tensors: NamedTensors, bucket_bytes: int, device: torch.device | None = None) -> Iterator[Bucket]:
    """Buckets of at most `bucket_bytes` on `device` (None: the tensors'); a larger tensor is a bucket of its own.

    Double buffering: bucket n + 2 reuses the memory of bucket n, so two buckets are valid at a time.
    """
    slots: list[Tensor | None] = [None, None]
    number = 0
    bucket: Bucket | None = None
    used = 0
    for name, tensor in tensors:
        size, item = tensor.numel() * tensor.element_size(), tensor.element_size()
        if bucket is not None and (used + size > bucket_bytes or used % item):  # a view needs an aligned start
            yield _cut(bucket, used)
            bucket, number = None, number + 1
        if bucket is None:
            slot = slots[number % 2]
            if slot is None or slot.numel() < size:
                slots[number % 2] = None  # frees the old memory before the new is allocated
                slot = torch.empty(max(bucket_bytes, size), dtype=torch.uint8, device=device or tensor.device)
            slots[number % 2] = slot if slot.numel() <= bucket_bytes else None
            bucket, used = Bucket(slot), 0
        target = bucket.data[used : used + size].view(tensor.dtype).view(tensor.shape)
        target.copy_(tensor.detach())
        bucket.names.append(name)
        bucket.dtypes.append(tensor.dtype)
        bucket.shapes.append(tuple(tensor.shape))
        used += size
    if bucket is not None:
        yield _cut(bucket, used)


def _cut(bucket: Bucket, used: int) -> Bucket:
    bucket.data = bucket.data[:used]
    return bucket

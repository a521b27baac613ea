"""Regions of tensors out of chunks that were cut in any way."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_checkpoint
from torch import Tensor
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from asd_megatron.checkpoint.distcp import DistributedCheckpoint
from asd_megatron.checkpoint.parts import Box, Part
from asd_megatron.checkpoint.shards import write_metadata, write_shard


class _Planner(torch_checkpoint.SavePlanner):
    """Writes the boxes (offsets, sizes) of one tensor `t`, in their order."""

    def __init__(self, tensor: Tensor, boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
        self.tensor, self.boxes = tensor, boxes

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        pass

    def create_local_plan(self) -> Any:
        properties, size = TensorProperties(dtype=self.tensor.dtype), self.tensor.shape
        chunks = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in self.boxes]
        return torch_checkpoint.SavePlan(
            [
                WriteItem(
                    MetadataIndex("t", c.offsets), WriteItemType.SHARD, tensor_data=TensorWriteData(c, properties, size)
                )
                for c in chunks
            ]
        )

    def create_global_plan(self, all_plans: Any) -> Any:
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: Any) -> Any:
        return new_plan

    def resolve_data(self, write_item: Any) -> Tensor:
        part, chunk = self.tensor, write_item.tensor_data.chunk
        for axis, (offset, size) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
            part = part.narrow(axis, offset, size)
        return part.contiguous()


def _cuts(rng: random.Random, length: int, most: int) -> list[tuple[int, int]]:
    """(offset, size) of consecutive, uneven parts."""
    inner = sorted(rng.sample(range(1, length), min(rng.randrange(most), length - 1)))
    bounds = [0, *inner, length]
    return [(a, b - a) for a, b in itertools.pairwise(bounds)]


def _write(folder: Path, tensor: Tensor, boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
    """Write the boxes with the package's writer as two ranks; PyTorch reads them too."""
    parts = []
    for offsets, sizes in boxes:
        values = tensor[tuple(slice(a, a + n) for a, n in zip(offsets, sizes, strict=True))].flatten()
        box = Box("t", tuple(tensor.shape), offsets, sizes, 0, padded=False)
        parts.append(Part((box,), tensor.dtype, values.clone, True))
    written = [write_shard(folder, rank, parts[rank::2]) for rank in (0, 1)]
    with pytest.raises(RuntimeError, match="the ranks hold"):
        write_metadata(folder, written[0].written)
    write_metadata(folder, [*written[0].written, *written[1].written])
    target = {"t": torch.empty_like(tensor)}
    torch_checkpoint.load(target, storage_reader=torch_checkpoint.FileSystemReader(folder), no_dist=True)
    assert torch.equal(target["t"], tensor)


@pytest.mark.parametrize("seed", range(8))
def test_any_region_is_read_from_any_cuts(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    shape = (3, 4, 7, 6)
    dtype = (torch.float32, torch.bfloat16, torch.float16, torch.float64)[seed % 4]
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    axes = [_cuts(rng, length, 4) for length in shape]
    if seed % 2:  # as Megatron stacks layers and experts: one each
        axes[:2] = [[(i, 1) for i in range(length)] for length in shape[:2]]
    boxes = [tuple(zip(*box, strict=True)) for box in itertools.product(*axes)]
    rng.shuffle(boxes)
    if seed < 4:
        writer = torch_checkpoint.FileSystemWriter(tmp_path)
        torch_checkpoint.save({}, storage_writer=writer, planner=_Planner(tensor, boxes), no_dist=True)  # type: ignore[arg-type]
    else:
        _write(tmp_path, tensor, boxes)
    checkpoint = DistributedCheckpoint(tmp_path)
    assert checkpoint.tensors["t"].cuts == tuple(len(parts) for parts in axes)
    assert torch.equal(checkpoint.read("t"), tensor)
    for _ in range(30):
        index = tuple(rng.randrange(length) for length in shape[: rng.randrange(4)])
        part = tensor[index]
        begin = rng.randrange(len(part))
        rows = slice(begin, rng.randrange(begin + 1, len(part) + 1))
        assert torch.equal(checkpoint.read("t", index), part), index
        assert torch.equal(checkpoint.read("t", index, rows), part[rows]), (index, rows)

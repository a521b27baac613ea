"""Safetensors files written block by block.

`safetensors.torch.save_file` wants all tensors of a file in memory. When names, shapes and dtype are known beforehand,
the header can be written first and each tensor to its place, some rows at a time; the file is the same byte for byte.

    8 bytes      length of the header
    header       {"__metadata__": {"format": "pt"}, name: {"dtype", "shape", "data_offsets"}, ...}, padded to 8 bytes
    data         the tensors, by name
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from asd_megatron.files import to_json
from asd_megatron.models.loading import FullTensor, Progress

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_ALIGNMENT = 8
BLOCK_BYTES = 64 << 20


def write_tensors(
    tensors: Mapping[str, FullTensor],
    dtype: torch.dtype,
    folder: Path,
    max_shard_bytes: int,
    progress: Progress | None = None,
) -> None:
    """Write safetensors of at most `max_shard_bytes` (a larger tensor gets a file of its own) with their index, or one
    file without an index when that is enough.

    The tensors are converted to `dtype` and read in their order, once, BLOCK_BYTES at a time. OSError when the system
    refuses to write.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    parts = ((name, tensor[rows]) for name, tensor in tensors.items() for rows in row_blocks(shapes[name]))
    write_parts(parts, shapes, dtype, folder, max_shard_bytes, progress)


def write_parts(
    parts: Iterator[tuple[str, Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    folder: Path,
    max_shard_bytes: int,
    progress: Progress | None = None,
) -> None:
    """As `write_tensors`, from a stream: each tensor of `shapes` in their order, as one part or as consecutive rows.
    Only one part is held at a time. ValueError for a stream that has not exactly these tensors."""
    shards = _shards(shapes, dtype, max_shard_bytes)
    names = [SINGLE] if len(shards) == 1 else _names(len(shards))
    total = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
    done = 0
    for file_name, shard in zip(names, shards, strict=True):
        header, starts = _header({name: shapes[name] for name in shard}, dtype)
        with (folder / file_name).open("wb") as file:
            file.write(header)
            for name in shard:
                file.seek(len(header) + starts[name])
                left = math.prod(shapes[name])
                while left:
                    found, part = next(parts, ("", torch.empty(0)))
                    if found != name or part.numel() > left:
                        raise ValueError(f"{name} {shapes[name]} was to be written, and {found or 'nothing'} came")
                    data = part.detach().to("cpu", dtype).contiguous()
                    file.write(data.view(-1).view(torch.uint8).numpy().data)
                    left -= data.numel()
                    done += data.nbytes
                    del part, data
                    if progress is not None:
                        progress(done, total)
    if (surplus := next(parts, None)) is not None:
        raise ValueError(f"{surplus[0]} came after the last tensor")
    if len(shards) > 1:
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(to_json(index, indent=2) + "\n", encoding="utf-8")


def row_blocks(shape: Sequence[int]) -> Iterator[slice]:
    """The rows of a tensor, as many at a time as have BLOCK_BYTES in float32."""
    rows = max(BLOCK_BYTES // (4 * math.prod(shape[1:])), 1)
    for start in range(0, shape[0], rows):
        yield slice(start, start + rows)


def _names(count: int) -> list[str]:
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _shards(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, max_shard_bytes: int) -> list[list[str]]:
    """The tensors of each file, in their order."""
    shards: list[list[str]] = []
    size = 0
    for name, shape in shapes.items():
        bytes_ = math.prod(shape) * dtype.itemsize
        if not shards or size + bytes_ > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += bytes_
    return shards


def _header(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> tuple[bytes, dict[str, int]]:
    """The bytes before the data, and where in the data each tensor begins."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts: dict[str, int] = {}
    end = 0
    for name in sorted(shapes):
        starts[name], end = end, end + math.prod(shapes[name]) * dtype.itemsize
        entries[name] = {
            "dtype": _DTYPES[dtype],
            "shape": list(shapes[name]),
            "data_offsets": [starts[name], end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text, starts

"""Conversions of damaged and hostile checkpoints, and onto a full disk: a message, and nothing half there."""

from __future__ import annotations

import argparse
import enum
import io
import os
import pickle
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_checkpoint
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from asd_megatron.checkpoint.common_state import arguments, read_common
from asd_megatron.checkpoint.conversion import hf_to_megatron, megatron_to_hf
from asd_megatron.checkpoint.distcp import DistributedCheckpoint
from asd_megatron.checkpoint.inspection import inspect
from asd_megatron.checkpoint.locate import find
from asd_megatron.errors import UserError
from tests.models import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_qwen3(tmp_path_factory.mktemp("model") / "hf")


@pytest.fixture
def saved(folder: Path, tmp_path: Path) -> Path:
    return hf_to_megatron(folder, tmp_path / "saved") / "release"


def _refused(saved: Path, folder: Path, message: str) -> None:
    out = saved.parents[1] / "out"
    with pytest.raises(UserError, match=message) as caught:
        megatron_to_hf(DistributedCheckpoint(saved), folder, out)
    assert str(saved) in str(caught.value) and not os.path.exists(out) and not list(out.parent.glob(".*.partial"))


def test_missing_and_torn_files(saved: Path, folder: Path) -> None:
    shard = saved / "__0_0.distcp"
    content = shard.read_bytes()
    shard.write_bytes(content[:-500])
    _refused(saved, folder, r"is incomplete: __0_0.distcp has \d+ bytes and should have at least \d+")
    metadata = torch_checkpoint.FileSystemReader(saved).read_metadata()
    where = metadata.storage_data[MetadataIndex("decoder.layers.mlp.linear_fc1.weight", torch.Size((2, 0, 0)))]
    for damage in (0, where.length // 2):  # its header, its numbers
        middle = where.offset + damage
        shard.write_bytes(content[:middle] + bytes(64) + content[middle + 64 :])
        _refused(saved, folder, r"decoder.layers.mlp.linear_fc1.weight cannot be read from __0_0.distcp")
    shard.unlink()
    _refused(saved, folder, r"is incomplete: __0_0.distcp is missing")
    (saved / ".metadata").write_bytes((saved / ".metadata").read_bytes()[:-2])
    _refused(saved, folder, "not safe to read")
    (saved / ".metadata").unlink()
    _refused(saved, folder, "is missing: the checkpoint is incomplete")


class _Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_nothing_in_a_checkpoint_is_run(saved: Path, folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    torch.save({"args": _Touch(mark), "iteration": 3}, saved / "common.pt")
    assert inspect(find(saved)).facts["step"] == 3
    shard, metadata = saved / "__0_0.distcp", torch_checkpoint.FileSystemReader(saved).read_metadata()
    index = MetadataIndex("decoder.final_layernorm.weight", torch.Size((0,)))
    hostile = io.BytesIO()
    torch.save(_Touch(mark), hostile)
    start = shard.stat().st_size
    shard.write_bytes(shard.read_bytes() + hostile.getvalue())
    length = len(hostile.getvalue())
    metadata.storage_data[index] = replace(metadata.storage_data[index], offset=start, length=length)
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    _refused(saved, folder, "decoder.final_layernorm.weight cannot be read")
    (saved / ".metadata").write_bytes(pickle.dumps({"state_dict_metadata": _Touch(mark)}))
    _refused(saved, folder, "not safe to read")
    assert not mark.exists()


KEY = "decoder.layers.mlp.linear_fc2.weight"


def _outside(metadata: Any) -> None:
    metadata.storage_data[MetadataIndex(KEY, torch.Size((0, 0, 0)))].relative_path = "../secret"


def _no_numbers(metadata: Any) -> None:
    metadata.state_dict_metadata[KEY].size = torch.Size((4, 32, 1 << 60))


def _chunk_outside(metadata: Any) -> None:
    metadata.state_dict_metadata[KEY].chunks[3] = ChunkStorageMetadata(torch.Size((3, 1, 0)), torch.Size((1, 32, 48)))


def _chunk_lost(metadata: Any) -> None:
    del metadata.state_dict_metadata[KEY].chunks[1]


def _chunk_twice(metadata: Any) -> None:
    """Layer 2 in place of layer 1: the numbers add up, a layer is missing."""
    metadata.state_dict_metadata[KEY].chunks[1] = metadata.state_dict_metadata[KEY].chunks[2]


def _not_located(metadata: Any) -> None:
    del metadata.storage_data[MetadataIndex(KEY, torch.Size((1, 0, 0)))]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_outside, "names the file '../secret', which is not in the folder"),
        (_no_numbers, "has the sizes"),
        (_chunk_outside, "lies outside the tensor"),
        (_chunk_lost, r"chunks of decoder.layers.mlp.linear_fc2.weight\[1\] .* hold 0 elements of 1536"),
        (_chunk_twice, r"chunks of decoder.layers.mlp.linear_fc2.weight\[1\] .* hold 0 elements of 1536"),
        (_not_located, "does not say where the chunk"),
        (lambda metadata: metadata.state_dict_metadata.clear(), "names no tensors"),
        (lambda metadata: metadata.__dict__.pop("storage_data"), "is damaged"),
    ],
)
def test_descriptions_that_make_no_sense(
    saved: Path, folder: Path, change: Callable[[Any], None], message: str
) -> None:
    metadata = torch_checkpoint.FileSystemReader(saved).read_metadata()
    change(metadata)
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    _refused(saved, folder, message)


@contextmanager
def _files_up_to(bytes_: int) -> Iterator[None]:
    """Writing beyond that size fails, as on a full disk."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("limit", [0, 1500, 50_000])
def test_a_full_disk_leaves_nothing(saved: Path, folder: Path, tmp_path: Path, limit: int) -> None:
    checkpoint, before = DistributedCheckpoint(saved), sorted(tmp_path.iterdir())
    with _files_up_to(limit), pytest.raises(UserError, match=r"out cannot be written \(File too large.*\): free space"):
        megatron_to_hf(checkpoint, folder, tmp_path / "out")
    with _files_up_to(limit), pytest.raises(UserError, match=r"out cannot be written \(File too large.*\): free space"):
        hf_to_megatron(folder, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_an_interrupted_conversion_leaves_nothing(saved: Path, folder: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    before = sorted(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        megatron_to_hf(DistributedCheckpoint(saved), folder, tmp_path / "out", progress=interrupt)
    with pytest.raises(KeyboardInterrupt):
        hf_to_megatron(folder, tmp_path / "out", progress=interrupt)
    assert sorted(tmp_path.iterdir()) == before


class _Planner(torch_checkpoint.DefaultSavePlanner):
    """Writes objects as they are, like Megatron's."""

    def transform_object(self, write_item: Any, object: Any) -> Any:
        return object if isinstance(object, io.BytesIO) else super().transform_object(write_item, object)


class _Backend(enum.Enum):
    FLASH = 1


@pytest.mark.parametrize("newer", [False, True])
def test_the_state_of_megatron_lm_is_shown(saved: Path, newer: bool) -> None:
    """Its arguments are a Namespace with enumerations and dtypes; from 0.20 on they are an object among the tensors."""
    given = argparse.Namespace(
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=1,
        backend=_Backend.FLASH,
        params_dtype=torch.bfloat16,
    )
    common = {"args": given, "iteration": 120, "checkpoint_version": 3.0, "opt": {"step": torch.ones(2)}}
    torch.save(common, saved / "common.pt")
    if newer:
        (saved / "common.pt").unlink()
        data = io.BytesIO()
        torch.save([common], data)
        checkpoint = DistributedCheckpoint(saved)
        state = {"common_state/shard_0_1": data, **{key: checkpoint.read(key) for key in checkpoint.tensors}}
        writer = torch_checkpoint.FileSystemWriter(saved)
        torch_checkpoint.save(state, storage_writer=writer, planner=_Planner(), no_dist=True)
    found = read_common(DistributedCheckpoint(saved))
    assert found["iteration"] == 120 and arguments(found)["tensor_model_parallel_size"] == 2
    facts = inspect(find(saved)).facts
    assert facts["written by"] == "Megatron-LM" and facts["step"] == 120
    assert facts["layout"] == "tensor 2, pipeline 1" and facts["parameters"] > 0


def test_chunks_of_another_form_are_read_by_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without checksums, with strides of their own, in another dtype than described."""
    tensors = {"plain": torch.randn(6, 5), "turned": torch.randn(5, 6).t(), "long": torch.arange(12).view(3, 4)}
    read: list[str] = []
    by_torch = DistributedCheckpoint._read_by_torch

    def counting(self: Any, tensor: Any, chunk: Any) -> Any:
        read.append(tensor.key)
        return by_torch(self, tensor, chunk)

    monkeypatch.setattr(DistributedCheckpoint, "_read_by_torch", counting)
    for sums in (True, False):
        torch.serialization.set_crc32_options(sums)
        try:
            torch_checkpoint.save(
                tensors, storage_writer=torch_checkpoint.FileSystemWriter(tmp_path / str(sums)), no_dist=True
            )
        finally:
            torch.serialization.set_crc32_options(True)
        read.clear()
        checkpoint = DistributedCheckpoint(tmp_path / str(sums))
        for key, tensor in tensors.items():
            assert torch.equal(checkpoint.read(key), tensor)
            assert torch.equal(checkpoint.read(key, rows=slice(1, 3)), tensor[1:3])
            assert torch.equal(checkpoint.read(key, (2,), slice(1, 3)), tensor[2, 1:3])
        assert sorted(set(read)) == ["long", "turned"] if sums else ["long", "plain", "turned"]


def test_an_unreadable_common_state_is_left_out(saved: Path) -> None:
    for content in (b"", b"PK", pickle.dumps({"iteration": 1})):
        (saved / "common.pt").write_bytes(content)
        assert read_common(DistributedCheckpoint(saved)) == {}

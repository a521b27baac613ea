"""Folders through a model on several ranks: bit for bit, each rank reading its slices alone, killed in the middle."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from asd_megatron.checkpoint.huggingface import CONFIG, INDEX, SINGLE, FolderReader, is_complete, read_config
from asd_megatron.errors import UserError
from asd_megatron.files import remove_partial
from tests.distributed.harness import RankError, run_ranks
from tests.models.tiny import tiny_qwen3, tiny_qwen3_moe

DENSE: list[dict[str, Any]] = [{"tensor": 2}, {"pipeline": 2}, {"pipeline": 2, "virtual_pipeline": 2}]
EXPERTS: list[dict[str, Any]] = [{"data": 2, "expert": 2}, {"tensor": 2, "sequence_parallel": True, "expert": 2}]
CASES = (
    ("single", torch.float32, DENSE),
    ("sharded", torch.float32, DENSE),
    ("half_sharded", torch.bfloat16, DENSE),
    ("experts", torch.float32, EXPERTS),
    ("half_experts", torch.bfloat16, EXPERTS),
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In float32, and as `half_*` in bfloat16; the sharded ones are tied."""
    root = tmp_path_factory.mktemp("folders")
    for name in ("single", "sharded", "experts"):
        make = tiny_qwen3_moe if name == "experts" else tiny_qwen3
        made = make(root / name, tie_word_embeddings=name == "sharded")
        half = root / f"half_{name}"
        shutil.copytree(made, half)
        tensors = {n: t.bfloat16() for n, t in load_file(made / SINGLE).items()}
        save_file(tensors, half / SINGLE)
        (half / CONFIG).write_text(json.dumps({**read_config(made), "dtype": "bfloat16"}))
        if name == "sharded":
            _shard(made)
            _shard(half)
    return root


def _shard(folder: Path) -> None:
    """Into three files, layers mixed."""
    tensors = load_file(folder / SINGLE)
    weight_map = {name: f"model-0000{i % 3 + 1}-of-00003.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, folder / file)
    size = sum(t.nbytes for t in tensors.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}))
    (folder / SINGLE).unlink()


def _weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def _build(folder: Path, layout: dict[str, Any], dtype: torch.dtype) -> Any:
    from asd_megatron.distributed.layout import Layout, init
    from asd_megatron.models.port import ModelPort

    sizes = Layout(**layout)
    return ModelPort.build(read_config(folder), init(sizes), sizes, dtype=dtype, layers="local")


class Counted:
    """A tensor that counts the elements that are read."""

    def __init__(self, tensor: Any, read: dict[str, int], name: str) -> None:
        self.tensor, self.shape, self.dtype, self.read, self.name = tensor, tensor.shape, tensor.dtype, read, name

    def __getitem__(self, index: Any) -> Tensor:
        part: Tensor = self.tensor[index]
        self.read[self.name] = self.read.get(self.name, 0) + part.numel()
        return part


def _through_a_model(rank: int, root: str, target: str) -> None:
    from asd_megatron.checkpoint.huggingface import write_folder

    for name, dtype, layouts in CASES:
        folder = Path(root) / name
        for number, layout in enumerate(layouts):
            port = _build(folder, layout, dtype)
            read: dict[str, int] = {}
            seen: list[tuple[int, int]] = []
            with FolderReader(folder) as tensors:
                counted = {n: Counted(t, read, n) for n, t in tensors.items()}
                port.load(counted, progress=lambda done, total, seen=seen: seen.append((done, total)))
            parameters = [p for chunk in port.chunks for p in chunk.parameters()]
            padding = (port.padded_vocab_size - port.vocab_size) * port.shape.hidden
            own = sum(p.numel() for p in parameters)
            vocabularies = 1 if port.tied else 2
            assert own - vocabularies * padding <= sum(read.values()) <= own, (name, layout)
            assert seen[-1] == (sum(p.nbytes for p in parameters),) * 2 and seen == sorted(seen)
            seen.clear()
            write_folder(
                port,
                folder,
                Path(target) / f"{name}_{number}",
                max_shard_bytes=9000 if number else 1 << 30,
                progress=lambda done, total, seen=seen: seen.append((done, total)),
            )
            size = sum(p.numel() for p in _weights(folder).values()) * dtype.itemsize
            assert seen[-1:] == [(size, size)] * (rank == 0)


def test_round_trips_are_bitwise_and_read_no_more_than_the_shard(folders: Path, tmp_path: Path) -> None:
    run_ranks(_through_a_model, 2, str(folders), str(tmp_path))
    for path in tmp_path.iterdir():
        source = folders / path.name.rpartition("_")[0]
        written, original = _weights(path), _weights(source)
        assert written.keys() == original.keys()
        for name, tensor in original.items():
            assert written[name].dtype == tensor.dtype and torch.equal(written[name], tensor), (path, name)
        assert read_config(path)["dtype"] == str(tensor.dtype).removeprefix("torch.")
        if path.name.endswith("0"):
            assert not (path / INDEX).exists()
        else:
            index = json.loads((path / INDEX).read_text())
            assert index["metadata"]["total_size"] == sum(t.nbytes for t in original.values())
            assert set(index["weight_map"].values()) == {p.name for p in path.glob("*.safetensors")}
    assert len(list(tmp_path.iterdir())) == sum(len(layouts) for *_, layouts in CASES)


def _one_bad_node(rank: int, root: str) -> str:
    """Rank 1 sees a folder with a torn file, as if it were on a disk of its node."""
    folder = Path(root) / ("good" if rank == 0 else "torn")
    port = _build(folder, {"data": 2}, torch.float32)
    before = [p.detach().zero_().clone() for p in port.chunks[0].parameters()]
    with FolderReader(folder) as tensors, pytest.raises(UserError) as error:
        port.load(tensors)
    dist.barrier()
    assert all(torch.equal(a, b) for a, b in zip(before, port.chunks[0].parameters(), strict=True))
    return str(error.value)


def test_what_one_rank_finds_all_raise(folders: Path, tmp_path: Path) -> None:
    for name in ("good", "torn"):
        shutil.copytree(folders / "single", tmp_path / name)
    os.truncate(tmp_path / "torn" / SINGLE, 5000)
    messages = run_ranks(_one_bad_node, 2, str(tmp_path))
    assert messages[0] == messages[1] and str(tmp_path / "torn" / SINGLE) in messages[0]


# ---------------------------------------------------------------- a kill


def _killed(rank: int, source: str, target: str) -> None:
    from asd_megatron.checkpoint.huggingface import write_folder

    port = _build(Path(source), {}, torch.float32)
    with FolderReader(source) as tensors:
        port.load(tensors)

    def die(done: int, total: int) -> None:
        if done > total // 2:
            os.kill(os.getpid(), signal.SIGKILL)

    write_folder(port, source, target, max_shard_bytes=9000, progress=die)


def _export(rank: int, source: str, target: str) -> None:
    from asd_megatron.checkpoint.huggingface import write_folder

    port = _build(Path(source), {}, torch.float32)
    with FolderReader(source) as tensors:
        port.load(tensors)
    write_folder(port, source, target, max_shard_bytes=9000)


def _names(folder: Path) -> Iterator[str]:
    return (path.name for path in folder.iterdir())


def test_a_killed_export_never_looks_finished(folders: Path, tmp_path: Path) -> None:
    source, target = folders / "single", tmp_path / "hf" / "step_000001"
    with pytest.raises(RankError):
        run_ranks(_killed, 1, str(source), str(target))
    assert not target.exists() and not is_complete(target)
    (partial,) = target.parent.iterdir()
    assert partial.name.startswith(".step_000001.") and len(list(partial.glob("*.safetensors"))) > 2
    assert not is_complete(partial)  # nor does what is left, under any name
    with pytest.raises(UserError):
        FolderReader(partial)

    assert remove_partial(target.parent) == 1  # as every run does when it starts
    run_ranks(_export, 1, str(source), str(target))
    assert list(_names(target.parent)) == [target.name] and is_complete(target)
    _equal(_weights(target), _weights(source))

    with pytest.raises(RankError):  # the older export stays until the new one is complete
        run_ranks(_killed, 1, str(folders / "sharded"), str(target))
    assert is_complete(target)
    _equal(_weights(target), _weights(source))
    assert remove_partial(target.parent) == 1 and list(_names(target.parent)) == [target.name]


def _equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

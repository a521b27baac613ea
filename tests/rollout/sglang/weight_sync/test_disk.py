"""The disk transport: servers are sent complete folders only, one version is kept, full disks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from asd_megatron.errors import UserError
from asd_megatron.rollout.sglang.weight_sync.disk import DiskTransport
from tests.rollout.sglang.weight_sync.world import FakeReceiver

MODEL = [(f"t{i}", torch.randn(30, 4).bfloat16()) for i in range(5)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["Qwen3ForCausalLM"], "dtype": "float32"}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_servers_are_sent_a_complete_folder_and_older_ones_are_removed(source: Path, tmp_path: Path) -> None:
    seen: list[Path] = []

    def answer(path: str, body: dict[str, Any]) -> dict[str, Any]:
        assert path == "/update_weights_from_disk"
        folder = Path(body["model_path"])
        assert folder.is_absolute()
        assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
        assert (folder / "tokenizer.json").exists()
        found = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(str(file)).items()}
        assert all(torch.equal(found[name], tensor) for name, tensor in MODEL)
        seen.append(folder)
        return {"success": True}

    transport = DiskTransport(tmp_path / "weights", source, max_shard_bytes=500)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "of-somebody-else").mkdir()
    for version in (1, 2):
        assert transport.send([FakeReceiver(answer=answer)], iter(MODEL), f"aa-{version}") == {}
    assert [folder.name for folder in seen] == ["aa-1", "aa-2"]
    assert len(list(seen[1].glob("*.safetensors"))) > 1
    assert sorted(p.name for p in (tmp_path / "weights").iterdir()) == ["aa-2", "of-somebody-else"]
    transport.close()
    assert [p.name for p in (tmp_path / "weights").iterdir()] == ["of-somebody-else"]


def test_a_server_that_cannot_load_it_is_named(source: Path, tmp_path: Path) -> None:
    refusing = FakeReceiver("http://a", lambda path, body: {"success": False, "message": "no such file"})
    transport = DiskTransport(tmp_path / "weights", source)
    failures = transport.send([refusing, FakeReceiver("http://b")], iter(MODEL), "aa-1")
    assert failures == {"http://a": "/update_weights_from_disk: no such file"}


def test_a_folder_that_cannot_be_written_is_named_and_the_tensors_are_read(source: Path, tmp_path: Path) -> None:
    (tmp_path / "weights").write_text("a file")
    stream = iter(MODEL)
    with pytest.raises(UserError, match=r"cannot be written to .*weights/aa-1"):
        DiskTransport(tmp_path / "weights", source).send([FakeReceiver()], stream, "aa-1")
    assert list(stream) == []


def test_without_servers_nothing_is_written(source: Path, tmp_path: Path) -> None:
    stream = iter(MODEL)
    assert DiskTransport(tmp_path / "weights", source).send([], stream, "aa-1") == {}
    assert list(stream) == []
    assert not (tmp_path / "weights").exists()

"""Checkpoint files from elsewhere: data is read, code is not run."""

from __future__ import annotations

import functools
import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_checkpoint
from torch.distributed.checkpoint.metadata import Metadata

from asd_megatron.checkpoint.common_state import load_common, read_common
from asd_megatron.checkpoint.distcp import DistributedCheckpoint
from asd_megatron.checkpoint.mapped_chunk import mapped_chunk
from asd_megatron.checkpoint.safety import read_metadata, weights_only
from asd_megatron.errors import UserError


class _Touch:
    """Creates a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_genuine_metadata_passes(tmp_path: Path) -> None:
    state = {"w": torch.ones(3, dtype=torch.bfloat16), "n": torch.zeros(2, dtype=torch.int64), "text": "abc"}
    torch_checkpoint.save(state, storage_writer=torch_checkpoint.FileSystemWriter(tmp_path), no_dist=True)
    read_metadata(tmp_path)


def test_metadata_that_would_run_code_is_refused(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    for content in (_Touch(mark), {"state_dict_metadata": [1, _Touch(mark)]}):
        (tmp_path / ".metadata").write_bytes(pickle.dumps(content))
        with pytest.raises(UserError, match=r"not safe to read: it names \w+\.mkdir"):
            read_metadata(tmp_path)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("torch", "load"),
        ("torch.distributed.checkpoint.filesystem", "os"),
    ],
)
def test_only_metadata_classes_are_known(tmp_path: Path, module: str, name: str) -> None:
    (tmp_path / ".metadata").write_bytes(f"c{module}\n{name}\n.".encode())
    with pytest.raises(UserError, match="not safe to read"):
        read_metadata(tmp_path)


def test_missing_or_torn_metadata(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is missing"):
        read_metadata(tmp_path)
    (tmp_path / ".metadata").write_bytes(pickle.dumps([1, 2, 3])[:-2])
    with pytest.raises(UserError, match="not safe to read"):
        read_metadata(tmp_path)


def test_objects_are_read_as_data_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    file = tmp_path / "object.pt"
    torch.save([_Touch(tmp_path / "executed")], file)
    with weights_only(), pytest.raises(pickle.UnpicklingError):
        torch.load(file, weights_only=False)
    assert not (tmp_path / "executed").exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


# ---------------------------------------------------------------- what a hostile pickle may try


class _Calls:
    """Calls `function` when unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return self.call


def _payloads(mark: Path) -> dict[str, Any]:
    touch = f"open({str(mark)!r}, 'w')"
    return {
        "os.system": _Calls(os.system, f"touch {mark}"),
        "eval": _Calls(eval, touch),
        "exec": _Calls(exec, touch),
        "nested": {"a": [1, ({"b": _Calls(os.mkdir, str(mark))},)]},
        "getattr": _Calls(getattr, _Calls(__import__, "os"), "system"),
        "import": _Calls(__import__, "antigravity"),
        "torch.load": _Calls(torch.load, str(mark)),
        "rebuild": _Calls(torch._tensor._rebuild_from_type_v2, eval, torch.Tensor, (touch,), {}),
        "partial": _Calls(functools.partial(eval, touch)),
        "jit": _Calls(torch.jit.load, str(mark)),
        "pickle in pickle": _Calls(pickle.loads, pickle.dumps(_Calls(os.mkdir, str(mark)))),
    }


@pytest.mark.parametrize("name", _payloads(Path()))
def test_hostile_pickles_run_nothing_wherever_they_are(tmp_path: Path, name: str) -> None:
    """In the metadata, as a chunk (`LoadItemType.TENSOR`), in common.pt, and read by Megatron-LM's state."""
    mark = tmp_path / "executed"
    hostile, folder = _payloads(mark)[name], tmp_path / "checkpoint"
    state = {"w": torch.ones(3), "v": torch.zeros(2)}
    torch_checkpoint.save(state, storage_writer=torch_checkpoint.FileSystemWriter(folder), no_dist=True)
    good = (folder / ".metadata").read_bytes()
    (folder / ".metadata").write_bytes(pickle.dumps(hostile))
    with pytest.raises(UserError, match="not safe to read: it names"):
        read_metadata(folder)

    (folder / ".metadata").write_bytes(good)
    torch.save({"args": hostile, "iteration": 3}, folder / "common.pt")
    checkpoint = DistributedCheckpoint(folder)
    with pytest.raises(pickle.UnpicklingError):
        load_common(checkpoint)
    assert read_common(checkpoint).get("iteration") in (3, None)  # None: given up

    shard = folder / "__0_0.distcp"
    described = read_metadata(folder)
    stream = io.BytesIO()
    torch.save(hostile, stream)
    for index, stored in described.storage_data.items():
        if index.fqn == "w":
            stored.offset, stored.length = shard.stat().st_size, len(stream.getvalue())
    shard.write_bytes(shard.read_bytes() + stream.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(described))
    with pytest.raises(UserError, match="w cannot be read from __0_0.distcp"):
        DistributedCheckpoint(folder).read("w")
    assert not mark.exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\x80\x04Nr\xff\xff\xff\x7f.", ""),  # entry 2^31 - 1 of the memo: 32 GiB
        (b"\x80\x04cbuiltins\nbytearray\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85R.", ""),  # bytearray(2 ** 40)
        (
            b"ctorch.distributed.checkpoint.metadata\nMetadata\nN}V__eq__\ncbuiltins\nlist\ns\x86b.",
            "changes the class Metadata",
        ),
    ],
    ids=["memo", "bytearray", "class"],
)
def test_pickles_of_known_classes_do_no_harm(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / ".metadata").write_bytes(content)
    before = Metadata.__eq__
    with pytest.raises(UserError, match=f"not safe to read.*{reason}"):
        read_metadata(tmp_path)
    assert Metadata.__eq__ is before
    archive = tmp_path / "common.pt"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", content)
    torch_checkpoint.save(
        {"w": torch.ones(3)}, storage_writer=torch_checkpoint.FileSystemWriter(tmp_path), no_dist=True
    )
    assert read_common(DistributedCheckpoint(tmp_path)) == {}
    assert mapped_chunk(archive, 0, archive.stat().st_size, (3,), torch.float32, check=False) is None


def test_metadata_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".metadata")
    with pytest.raises(UserError, match="no regular file"):
        read_metadata(tmp_path)

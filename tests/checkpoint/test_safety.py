"""Checkpoint files from elsewhere: data is read, code is not run."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_checkpoint

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

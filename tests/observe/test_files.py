"""Atomic files and folders: complete or absent."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from asd_megatron import files
from asd_megatron.errors import UserError
from asd_megatron.files import (
    atomic_file,
    atomic_folder,
    atomic_write,
    json_safe,
    remove_folder,
    remove_partial,
    write_json,
)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_write_creates_parents_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.txt"
    atomic_write(path, "one")
    atomic_write(path, b"two\r\n")
    assert path.read_bytes() == b"two\r\n"
    assert names(path.parent) == ["b.txt"]


def test_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = atomic_write(tmp_path / "x", "old")

    def fail() -> None:
        with atomic_file(path) as partial:
            partial.write_text("new, but")
            raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["x"]


def test_folder_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "step_000001"
    with atomic_folder(target) as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "weights").write_text("w")
        assert not target.exists()
    assert (target / "sub" / "weights").read_text() == "w"

    def fail() -> None:
        with atomic_folder(tmp_path / "other") as broken:
            (broken / "half").write_text("h")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        fail()
    assert names(tmp_path) == ["step_000001"]


def test_existing_folder_is_refused_or_replaced(tmp_path: Path) -> None:
    target = tmp_path / "hf"
    with atomic_folder(target) as partial:
        (partial / "old").write_text("")
    with pytest.raises(UserError, match="exists already"), atomic_folder(target):
        pass
    with atomic_folder(target, replace=True) as partial:
        (partial / "new").write_text("")
    assert names(target) == ["new"]
    assert names(tmp_path) == ["hf"]


def test_leftovers_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".x.0123456789ab.partial").mkdir()
    (tmp_path / ".y.0123456789ab.partial").write_text("")
    (tmp_path / "kept").write_text("")
    assert remove_partial(tmp_path) == 2
    assert names(tmp_path) == ["kept"]
    assert remove_partial(tmp_path / "missing") == 0


def test_a_folder_killed_while_it_was_replaced_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "step_000001"
    with atomic_folder(target) as partial:
        (partial / "old").touch()

    class Killed(BaseException):
        """Ends the program at once: nothing is cleaned up."""

    rename = os.rename

    def killed(source: Path, to: Path) -> None:
        if to == target:
            raise Killed
        rename(source, to)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", killed)
        patch.setattr(files, "_discard", lambda path: None)
        with pytest.raises(Killed), atomic_folder(target, replace=True) as partial:
            (partial / "new").touch()
    assert not target.exists() and len(names(tmp_path)) == 2
    assert remove_partial(tmp_path) == 2
    assert names(tmp_path) == ["step_000001"] and names(target) == ["old"]


def test_a_folder_is_removed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.setattr(shutil, "rmtree", lambda path: None)  # killed there
    remove_folder(tmp_path / "a")
    assert not (tmp_path / "a").exists()
    monkeypatch.undo()
    assert remove_partial(tmp_path) == 1 and names(tmp_path) == []


def test_json_is_strict(tmp_path: Path) -> None:
    value = {
        "nan": float("nan"),
        "inf": [float("inf"), -1.5],
        "path": tmp_path,
        "tensor": torch.tensor(2.5),
        "numpy": np.float32("nan"),
        "count": np.int64(3),
        "flag": True,
        "text": "π",
        "none": None,
        7: (1, 2),
    }
    read = json.loads(write_json(tmp_path / "v.json", value).read_text())
    assert read == {
        "nan": None,
        "inf": [None, -1.5],
        "path": str(tmp_path),
        "tensor": 2.5,
        "numpy": None,
        "count": 3,
        "flag": True,
        "text": "π",
        "none": None,
        "7": [1, 2],
    }
    assert json_safe(float("-inf")) is None

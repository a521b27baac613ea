"""A save that the operating system refuses: a UserError on every rank, and everything that was there stays."""

from __future__ import annotations

import errno
import io
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from asd_megatron.checkpoint import lineage, training
from asd_megatron.errors import UserError
from tests.checkpoint.trainer import Trainer
from tests.distributed.harness import run_ranks


@contextmanager
def _files_up_to(bytes_: int) -> Iterator[None]:
    """Writing beyond that size fails, as on a full disk."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


@contextmanager
def _full_disk(space: int) -> Iterator[None]:
    """The files of a checkpoint's tensors have room for `space` bytes."""
    written = 0

    class Stream(io.FileIO):
        def write(self, data: Any) -> int:
            nonlocal written
            written += memoryview(data).nbytes
            if written > space:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    plain = Path.open

    def opened(path: Path, mode: str = "r", *how: Any, **more: Any) -> Any:
        return Stream(path, mode) if path.suffix == ".distcp" else plain(path, mode, *how, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", opened)
        yield


@contextmanager
def _damaged(name: str, length: int | None) -> Iterator[None]:
    """When all files of a checkpoint are written, another program cuts that one to `length` bytes; None: removes it."""
    write = training.write_common

    def written(folder: Path, content: Any) -> None:
        write(folder, content)
        os.remove(folder / name) if length is None else os.truncate(folder / name, length)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "write_common", written)
        yield


def _failures(rank: int, folder: str) -> None:
    root = Path(folder) / "checkpoints"
    trainer = Trainer({"tensor": 2}, True, seed=1)
    trainer.save(root, 1)
    before = ["latest", "step_000001"]
    for failing in (0, 1):
        for limit in (0, 2000):
            with (
                _files_up_to(limit if rank == failing else 1 << 30),
                pytest.raises(UserError, match="checkpoint of step 2 cannot be saved in .*free space") as caught,
            ):
                trainer.save(root, 2)
            assert "(File too large)" in str(caught.value) and "\n" not in str(caught.value)
            if rank == 0:
                assert sorted(os.listdir(root)) == before
                assert lineage.latest(root) == root / "step_000001"
        for space in (0, 700, 3000):  # bytes of the shards
            with _full_disk(space if rank == failing else 1 << 30), pytest.raises(UserError, match="save") as caught:
                trainer.save(root, 2)
            assert "(No space left on device)" in str(caught.value) and "\n" not in str(caught.value)
            if rank == 0:
                assert sorted(os.listdir(root)) == before
    for name, length, reason in (
        ("__1_0.distcp", None, "No such file"),
        ("run_state.json", None, "No such file"),
        ("__0_0.distcp", 100, "__0_0.distcp has 100 bytes there, and"),
    ):
        with _damaged(name, length), pytest.raises(UserError, match=f"step 2 cannot be saved in .*{reason}"):
            trainer.save(root, 2)
        if rank == 0:
            assert sorted(os.listdir(root)) == before
            assert lineage.latest(root) == root / "step_000001"
    blocked = Path(folder) / "blocked"
    if rank == 0:
        blocked.write_text("")
    with pytest.raises(UserError, match="cannot be saved in .*blocked"):
        trainer.save(blocked, 2)
    trainer.save(root, 2)
    assert lineage.latest(root) == root / "step_000002"

    # An error of ours on one rank is raised on all too.
    own = os.listdir(root)
    with pytest.raises(ValueError if rank == 0 else RuntimeError, match="run_state.a is a set"):
        trainer.save(root, 3, {"a": {1}} if rank == 0 else {})
    assert os.listdir(root) == own


def test_a_failed_save_changes_nothing(tmp_path: Path) -> None:
    run_ranks(_failures, 2, str(tmp_path))

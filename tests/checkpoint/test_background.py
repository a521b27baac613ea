"""Checkpoints that are written while training goes on."""

from __future__ import annotations

import errno
import logging.handlers
import os
import re
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from asd_megatron.checkpoint import background, lineage, shards, training
from asd_megatron.checkpoint.background import Background
from asd_megatron.errors import UserError
from asd_megatron.run.folder import CHECKPOINTS
from asd_megatron.run.saving import Saver
from tests.checkpoint.trainer import RUN_STATE, Trainer
from tests.distributed.harness import RankError, run_ranks


def _begin(trainer: Trainer, folder: Path, step: int, background: Background) -> None:
    arguments = (trainer.port, trainer.optimizer, trainer.scheduler, RUN_STATE)
    training.save(folder, step, *arguments, copies=trainer.copies, background=background)


def _in_flight(rank: int, folder: str) -> None:
    root = Path(folder)
    trainer = Trainer({"data": 2}, True, 1, torch.bfloat16, copies=True)
    background = Background(trainer.port.process_groups)
    assert background.settle() == 0
    trainer.steps(range(2))
    trainer.save(root, 2)
    go, write = threading.Event(), shards.write_tensor

    def slowly(*arguments: Any) -> None:
        assert rank == 0 or go.wait(60)
        write(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "write_tensor", slowly)
        trainer.steps(range(2, 3))
        want, kept = trainer.weights(), trainer.kept()
        _begin(trainer, root, 3, background)
        exported = time.time()
        with pytest.raises(RuntimeError, match="in flight"):
            _begin(trainer, root, 3, background)
        trainer.steps(range(3, 5))  # the state changes, and training's collectives go on
        assert background.settle(wait=False) == 0 and background.step == 3
        assert lineage.latest(root) == root / "step_000002"
        go.set()
        assert (background.settle(), background.settle(), background.step) == (3, 0, 0)
        assert lineage.latest(root) == root / "step_000003"
    assert (root / "step_000003" / lineage.RUN_STATE).stat().st_mtime <= exported, (
        "an export meanwhile is of this branch"
    )
    again = Trainer({"data": 2}, True, 2, torch.bfloat16, copies=True)
    again.load(root / "step_000003")
    found = again.weights() | again.kept()
    assert all(torch.equal(tensor, found[name]) for name, tensor in (want | kept).items())
    again.steps(range(3, 5))
    after = again.weights()
    assert all(torch.equal(tensor, after[name]) for name, tensor in trainer.weights().items())

    def refused(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for failing in (0, 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shards, "write_tensor", refused if rank == failing else write)
            _begin(trainer, root, 5, background)
            with pytest.raises(UserError, match=r"checkpoint of step 5 cannot be saved in .*No space left.*free space"):
                background.settle()
        if rank == 0:
            assert sorted(os.listdir(root)) == ["latest", "step_000002", "step_000003"]
    _begin(trainer, root, 5, background)
    background.close()  # as after an exception: the checkpoint is completed
    assert lineage.latest(root) == root / "step_000005"


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    run_ranks(_in_flight, 2, str(tmp_path))


def _killed(rank: int, folder: str) -> None:
    root, write = Path(folder), shards.write_tensor
    trainer = Trainer({"data": 2}, True, seed=1)
    background = Background(trainer.port.process_groups)
    trainer.steps(range(2))
    trainer.save(root, 2)
    calls: list[Any] = []

    def killing(*arguments: Any) -> None:
        write(*arguments)
        calls.append(arguments)
        if len(calls) == 20:
            os.kill(os.getpid(), signal.SIGKILL)

    shards.write_tensor = killing
    trainer.steps(range(2, 4))
    _begin(trainer, root, 4, background)
    background.settle()


def _resumed(rank: int, folder: str) -> None:
    root = Path(folder)
    straight = Trainer({"data": 2}, True, seed=1)
    straight.steps(range(4))
    again = Trainer({"data": 2}, True, seed=2)
    again.load(lineage.latest(root))
    again.steps(range(2, 4))
    found = again.weights()
    assert all(torch.equal(tensor, found[name]) for name, tensor in straight.weights().items())
    again.save(root, 4)
    if rank == 0:
        assert sorted(os.listdir(root)) == ["latest", "step_000002", "step_000004"]


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="exit codes"):
        run_ranks(_killed, 2, str(tmp_path))
    left = sorted(os.listdir(tmp_path))
    assert len(left) == 3 and left[0].startswith(".step_000004.") and left[1:] == ["latest", "step_000002"]
    assert any(path.stat().st_size > 0 for path in (tmp_path / left[0]).glob("*.distcp"))
    run_ranks(_resumed, 2, str(tmp_path))


def _without_memory(rank: int, folder: str) -> list[str]:
    """What this rank logs while rank 1 gets no host memory for a save, then for no other."""
    lines = logging.handlers.BufferingHandler(100)
    logging.getLogger("asd_megatron").addHandler(lines)
    trainer = Trainer({"data": 2}, True, seed=1)
    kept: Any = SimpleNamespace(megatron=trainer.optimizer, scheduler=trainer.scheduler, run_state=dict)
    settings = SimpleNamespace(async_save=True, keep=3, keep_every=0)
    recipe: Any = SimpleNamespace(run=SimpleNamespace(path=Path(folder)), checkpoint=settings)
    saver = Saver(recipe, "rl", trainer.port, kept, None, None, newest=0, say=print, before=lambda: None)
    root = Path(folder) / CHECKPOINTS
    for step, alignment in ((1, 64), (2, 1 << 50), (3, 64)):
        trainer.steps(range(step, step + 1))
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                patch.setattr(background, "ALIGNMENT", alignment)
            saver.save(step, RUN_STATE)
        assert saver.newest == (2 if step == 2 else step - 1)
        assert step != 2 or lineage.latest(root) == root / "step_000002"
        saver.settle()
        assert saver.newest == step
    saver.close(lambda line: None)
    trainer.steps(range(4, 5))
    again = Trainer({"data": 2}, True, seed=2)
    again.load(root / "step_000002")
    again.steps(range(3, 5))
    found = again.weights()
    assert all(torch.equal(tensor, found[name]) for name, tensor in trainer.weights().items())
    return [record.getMessage() for record in lines.buffer]


def test_ranks_write_in_the_foreground_where_one_lacks_host_memory(tmp_path: Path) -> None:
    (line,), others = run_ranks(_without_memory, 2, str(tmp_path))
    assert re.match(
        r"the checkpoint of step 2 is written while training waits, because rank 1 cannot copy its \d\.\d GB to host "
        r"memory \(RuntimeError: .*can't allocate memory.*\): free host memory, or set checkpoint.async_save to false",
        line,
    )
    assert others == []

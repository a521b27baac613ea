"""A run of two ranks that is killed while threads of its own write a checkpoint beside the training."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import RankError, run_ranks
from tests.e2e.world import World, metrics, steps

TENSORS = 20  # that a rank writes of the checkpoint before its thread stands still
LIMIT = 60.0  # seconds until a rank gives up waiting for the others


def _train(rank: int, argv: list[str]) -> int:
    from asd_megatron import train

    return train.main(argv)


def _killed(rank: int, argv: list[str], run: str) -> None:
    """Train; the checkpoint of step 4 is never complete, and all ranks are killed once step 5 is done."""
    from asd_megatron.checkpoint import shards

    write, folder = shards.write_tensor, Path(run)
    written: list[int] = []

    def interrupted(*arguments: Any) -> None:
        write(*arguments)
        if threading.current_thread() is threading.main_thread():
            return
        written.append(len(written))
        if (folder / "checkpoints" / "step_000002").is_dir() and len(written) >= 2 * TENSORS:
            arguments[1].flush()
            folder.with_suffix(f".{rank}").touch()
            time.sleep(LIMIT)
            raise TimeoutError("step 5 has not ended")

    def kill() -> None:
        while True:
            with suppress(FileNotFoundError):
                if all(folder.with_suffix(f".{r}").exists() for r in (0, 1)) and 5 in steps(folder):
                    os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.02)

    shards.write_tensor = interrupted
    threading.Thread(target=kill, daemon=True).start()
    _train(rank, argv)


def test_a_kill_while_a_checkpoint_is_written_in_the_background(world: World) -> None:
    """The run resumes from the checkpoint before, and ends as if nothing had happened, bit for bit."""
    recipe = world.recipe(
        "killed.yaml",
        run={"steps": 6},
        parallelism={"data": 2, "distributed_optimizer": True},
        algorithm={"name": "antisd"},
        checkpoint={"every": 2, "keep": 4, "async_save": True},
    )
    straight, folder = world.run_folder("not_killed"), world.run_folder("killed")
    assert run_ranks(_train, 2, [str(recipe), "--run.name", straight.name]) == [0, 0]
    argv = [str(recipe), "--run.name", folder.name]
    with pytest.raises(RankError, match=r"exit codes \[-9, (-9|None)\]|exit codes \[None, -9\]"):
        run_ranks(_killed, 2, argv, str(folder))
    checkpoints = folder / "checkpoints"
    (partial,) = (path for path in checkpoints.iterdir() if path.name.startswith(".step_000004."))
    assert all((partial / f"__{rank}_0.distcp").stat().st_size > 0 for rank in (0, 1))
    assert not (partial / ".metadata").exists()
    assert (checkpoints / "latest").read_text() == "step_000002\n"

    assert run_ranks(_train, 2, argv) == [0, 0]
    names = ["latest", "step_000002", "step_000004", "step_000006"]
    assert sorted(path.name for path in checkpoints.iterdir()) == names
    assert metrics(folder) == metrics(straight)
    for name in names[1:]:
        for file in ("__0_0.distcp", "__1_0.distcp", ".metadata", "common.pt"):
            assert (checkpoints / name / file).read_bytes() == (straight / "checkpoints" / name / file).read_bytes()

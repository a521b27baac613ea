"""Faults of what is on the disk: checkpoints, data, space, the layout that reads them."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from asd_megatron.checkpoint import lineage
from asd_megatron.checkpoint.manifest import MANIFEST, Manifest
from asd_megatron.checks.drill.disturbance import (
    FAULT_STEP,
    Disturbance,
    Verdict,
    disturb,
    disturb_once,
    judged,
    tokens_lost,
    verdict,
)
from asd_megatron.checks.drill.fault import Fault, NotPossible, brief
from asd_megatron.checks.drill.program import Program
from asd_megatron.checks.drill.world import Sections, World, losses_close, newest, tokens, weights_equal
from asd_megatron.checks.ranks import CheckError
from asd_megatron.puzzle.task import PuzzleStream
from asd_megatron.records import Problem
from asd_megatron.run.folder import CHECKPOINTS

SPACE_MIB = 8
PROBLEMS = 12
PAGE_BYTES = 4096


def faults() -> dict[str, Fault]:
    fallback = "the file is named, the checkpoint before is used with a warning; resumed bit for bit"
    damages = {
        "truncated": ("a checkpoint file cut in half", _truncate),
        "bit_flipped": ("one bit of a checkpoint file flipped", _flip),
        "page_lost": ("4 KiB of a checkpoint file zeroed", _lose_page),
        "missing": ("a checkpoint file removed", _remove),
    }
    return {
        **{f"checkpoint_{name}": Fault(what, fallback, _damaged(damage)) for name, (what, damage) in damages.items()},
        "checkpoint_hostile": Fault(
            "a checkpoint whose metadata is a pickle that runs code", f"nothing of it runs; {fallback}", _hostile
        ),
        "kill_in_background_save": Fault(
            "SIGKILL of all ranks while a checkpoint is written in the background",
            "the partial checkpoint is never used; resumed bit for bit",
            _killed_in_background,
        ),
        "disk_full": Fault(
            f"no space left ({SPACE_MIB} MiB file system), and space again later",
            "one line; an intact checkpoint stays; with space the same command ends bit for bit",
            _full,
        ),
        "no_space_for_one_save": Fault(
            "ENOSPC while one checkpoint is written", "one line; the run continues and saves again", _one_save_fails
        ),
        "malformed_line": Fault(
            "a malformed line in the training set, found when the run is started again",
            "refused with file and line; corrected, resumed bit for bit",
            _malformed,
        ),
        "changed_layout": Fault(
            "stopped with tensor parallelism 2, resumed with pipeline parallelism 2",
            "losses equal to 1e-5",
            _changed_layout,
        ),
    }  # fmt: skip


def _stopped(world: World, name: str, sections: Sections | None = None) -> None:
    """A run that has stopped after FAULT_STEP, its state saved."""
    disturbance = Disturbance("update", signal=signal.SIGTERM, sections=sections or {})
    ended = disturb_once(world, name, disturbance)
    if newest(world.run_folder(name)) != FAULT_STEP:
        raise CheckError(f"no checkpoint of step {FAULT_STEP}: {ended.tail}")


def _shard(run: Path) -> Path:
    return run / CHECKPOINTS / lineage.name(FAULT_STEP) / "__1_0.distcp"


def _remove(file: Path) -> None:
    file.unlink()


def _truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def _flip(file: Path) -> None:
    _overwrite(file, lambda old: bytes([old[0] ^ 4]) + old[1:])


def _lose_page(file: Path) -> None:
    _overwrite(file, lambda old: bytes(len(old)))


def _overwrite(file: Path, change: Callable[[bytes], bytes]) -> None:
    """Change a page in the middle of the file."""
    with file.open("r+b") as f:
        f.seek(file.stat().st_size // 2)
        old = f.read(PAGE_BYTES)
        f.seek(-len(old), os.SEEK_CUR)
        f.write(change(old))


def _damaged(damage: Callable[[Path], Any]) -> Callable[[World, str], Verdict]:
    def act(world: World, name: str) -> Verdict:
        _stopped(world, name)
        damage(_shard(world.run_folder(name)))
        return _falls_back(world, name, "__1_0.distcp")

    return act


def _falls_back(world: World, name: str, file: str) -> Verdict:
    """Start the run again, whose newest checkpoint is damaged."""
    run = world.run_folder(name)
    ended = world.complete(world.recipe(name))
    said = [line for line in ended.output.splitlines() if file in line and lineage.name(FAULT_STEP) in line]
    equal = weights_equal(run, world.undisturbed("tp2"))
    happened = brief(said[0]) if said else "nothing said"
    return verdict({"file and checkpoint named": bool(said)}, happened, equal=equal)


class _Hostile:
    def __init__(self, made: Path) -> None:
        self._made = made

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._made),)


def _hostile(world: World, name: str) -> Verdict:
    _stopped(world, name)
    made, checkpoint = world.folder / f"{name}.ran", _shard(world.run_folder(name)).parent
    manifest = Manifest.read(checkpoint)
    assert manifest is not None
    (checkpoint / ".metadata").write_bytes(pickle.dumps(_Hostile(made)))
    (checkpoint / MANIFEST).unlink()
    Manifest.write(checkpoint, manifest.step, manifest.stage, manifest.layout, {})  # as its author would
    found = _falls_back(world, name, ".metadata")
    if made.exists():
        return Verdict(False, "its code RAN", None, 0, found.weights_equal)
    return found


def _killed_in_background(world: World, name: str) -> Verdict:
    sections: Sections = {"checkpoint": {"every": 1, "keep": 3, "async_save": True, "export_at_end": False}}
    outcome = disturb(world, name, Disturbance("save", "kill", rank=None, sections=sections))
    happened = f"status {outcome.ended.status}; checkpoint of step {outcome.kept}"
    return judged({"the one before is intact": outcome.kept == FAULT_STEP - 1}, happened, outcome)


@contextmanager
def _small_disk(folder: Path) -> Iterator[None]:
    """`folder` on a file system of SPACE_MIB. Raises CheckError where mounting is not permitted."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={SPACE_MIB}m", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False) if shutil.which("mount") else None
    if done is None or done.returncode:
        raise NotPossible("mounting a file system needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _full(world: World, name: str) -> Verdict:
    disk = world.folder / "disk"
    with _small_disk(disk):
        filler = disk / "filler"

        def fill(program: Program) -> None:
            with filler.open("wb") as f:
                left = os.statvfs(disk)
                f.write(bytes(left.f_bavail * left.f_frsize - PAGE_BYTES))

        sections: Sections = {"run": {"folder": str(disk / "{name}")}}
        run = disk / name
        ended = disturb_once(world, name, Disturbance("update", sections=sections), fill)
        learned, kept = tokens(run), newest(run)
        filler.unlink()
        world.complete(world.recipe(name, sections=sections))
        equal = weights_equal(run, world.undisturbed("tp2"))
    said = [line for line in ended.output.splitlines() if "No space left" in line]
    conditions = {
        "an intact checkpoint": kept >= FAULT_STEP - 1,
        "said": bool(said),
        "no traceback": "Traceback" not in ended.output,
    }
    happened = f"status {ended.status}; {brief(said[0]) if said else 'nothing said'}; checkpoint of step {kept}"
    return verdict(conditions, happened, ended.seconds, tokens_lost(learned, kept), equal=equal)


def _one_save_fails(world: World, name: str) -> Verdict:
    ended = disturb_once(world, name, Disturbance("save", "no_space"))
    run = world.run_folder(name)
    equal = weights_equal(run, world.undisturbed("tp2"))
    said = [line for line in ended.output.splitlines() if "No space left" in line]
    passed = ended.status == 0 and equal and bool(said) and "Traceback" not in ended.output
    return Verdict(passed, f"status {ended.status}; {brief(said[0]) if said else 'nothing said'}", None, 0, equal)


def _malformed(world: World, name: str) -> Verdict:
    """With the built-in problems as a file."""
    file = world.folder / f"{name}.jsonl"
    lines = [_line(puzzle) for puzzle in PuzzleStream.of("train", PROBLEMS)]
    file.write_text("".join(lines))
    sections: Sections = {"data": {"train": str(file)}}
    _stopped(world, name, sections)
    recipe = world.recipe(name, sections=sections)
    file.write_text("".join([*lines[:-2], lines[-2][:20] + "\n", lines[-1]]))
    with Program([str(recipe)], world.folder / f"{name}.refused.log") as program:
        refused = program.ended()
    file.write_text("".join(lines))
    world.complete(recipe)
    reference = f"undisturbed_{name}"
    world.complete(world.recipe(reference, sections=sections))
    equal = weights_equal(world.run_folder(name), world.run_folder(reference))
    said = refused.lines("error")
    named = len(said) == 1 and file.name in said[0] and str(PROBLEMS - 1) in said[0]
    happened = f"status {refused.status}; {brief(said[0]) if said else 'nothing said'}"
    return Verdict(refused.status == 2 and named and equal, happened, None, 0, equal)


def _line(problem: Problem) -> str:
    fields = {"id": problem.prompt_id, "messages": problem.messages, "answer": problem.answer}
    return json.dumps({**fields, "solution": problem.solution}) + "\n"


def _changed_layout(world: World, name: str) -> Verdict:
    _stopped(world, name)
    recipe, run = world.recipe(name), world.run_folder(name)
    world.complete(recipe, "--parallelism.tensor", "1", "--parallelism.pipeline", "2")
    close = losses_close(run, world.undisturbed("tp2"))
    return Verdict(close, f"losses {'equal to 1e-5' if close else 'DIFFER'}; other bits, by design", None)

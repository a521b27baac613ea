"""What has become of checkpoints on the disk, without a model: from sizes alone (`statuses`), or by reading them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from asd_megatron.checkpoint import lineage
from asd_megatron.checkpoint.distcp import DistributedCheckpoint
from asd_megatron.checkpoint.lineage import RUN_STATE
from asd_megatron.checkpoint.manifest import MANIFEST, DamagedCheckpoint, Manifest, Progress, damaged
from asd_megatron.checkpoint.run_state import RunStateFile
from asd_megatron.errors import UserError

NO_MANIFEST = "no manifest (written by an earlier version): only sizes and the chunks' checksums can be compared"


@dataclass(frozen=True)
class Status:
    """A checkpoint of a run. `problem`: what is wrong with it, as far as sizes show; None: nothing. `layout`: of its
    writer, None where no manifest says so. `latest`: whether the run continues from it."""

    name: str
    step: int
    stage: str | None
    layout: str | None
    bytes: int
    age_seconds: float
    problem: str | None
    latest: bool

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "age_seconds": round(self.age_seconds)}


def statuses(folder: Path) -> list[Status]:
    """The checkpoints of a run's `checkpoints` folder, the oldest first. Reads small files alone."""
    newest = lineage.named(folder)
    found = [_status(path, newest) for path in lineage.all_of(folder)]
    if newest is not None and newest.name not in {status.name for status in found}:
        step = lineage.step_of(newest.name)
        found.append(Status(newest.name, step, None, None, 0, 0.0, "it is missing, and `latest` names it", True))
    return found


def _status(path: Path, newest: Path | None) -> Status:
    files = [file.stat() for file in path.iterdir() if file.is_file()]
    size, written = sum(file.st_size for file in files), max((file.st_mtime for file in files), default=time.time())
    step, stage, layout, problem = lineage.step_of(path.name), None, None, None
    try:
        _, manifest = open_checked(path)
    except UserError as error:
        problem = str(error)
    else:
        if manifest is not None:
            stage, layout = manifest.stage or None, manifest.layout_text
            written = datetime.fromisoformat(manifest.time_utc).timestamp()
            problem = next(iter(manifest.wrong_sizes(path)), None)
    age = datetime.now(UTC).timestamp() - written
    latest = newest is not None and path.name == newest.name
    return Status(path.name, step, stage, layout, size, max(age, 0.0), problem, latest)


def open_checked(path: Path) -> tuple[RunStateFile, Manifest | None]:
    """The run_state.json of the checkpoint `path`, compared with its manifest, and that; None for a checkpoint of a
    version without. UserError for what is no checkpoint, DamagedCheckpoint for one in which these are not as they were
    written."""
    manifest = Manifest.read(path)
    if manifest is not None:
        for problem in manifest.problems(path, [RUN_STATE] if RUN_STATE in manifest.files else []):
            raise damaged(path, problem)
    state = RunStateFile.read(path)
    if manifest is None and state.has_manifest:
        raise damaged(path, f"{MANIFEST} is missing")
    return state, manifest


def damage_by_size(path: Path) -> DamagedCheckpoint | None:
    """What is wrong with the checkpoint `path`, as far as sizes show. UserError for what is no checkpoint."""
    try:
        _, manifest = open_checked(path)
    except DamagedCheckpoint as damage:
        return damage
    wrong = [] if manifest is None else manifest.wrong_sizes(path)
    return damaged(path, wrong[0]) if wrong else None


def problems(path: Path, progress: Progress | None = None) -> Iterator[str]:
    """What is wrong with the checkpoint `path`, in words, one line each. Reads all of it; where it has no manifest,
    its tensors chunk by chunk. Memory: a block of a file, or a tensor's chunk."""
    try:
        manifest = Manifest.read(path)
        if manifest is not None:
            yield from manifest.problems(path, progress=progress)
            return
        open_checked(path)
        checkpoint = DistributedCheckpoint(path)
    except UserError as error:
        yield str(error)
        return
    for key, tensor in checkpoint.tensors.items():
        for chunk in tensor.chunks:
            try:
                checkpoint.read_box(key, chunk.offsets, chunk.sizes)
            except UserError as error:
                yield str(error)
            if progress is not None:
                progress(chunk.length)


def total_bytes(path: Path) -> int:
    """Of what `problems` reads, about."""
    return sum(file.stat().st_size for file in path.iterdir() if file.is_file()) if path.is_dir() else 0

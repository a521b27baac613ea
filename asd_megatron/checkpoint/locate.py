"""Finding the checkpoint, or the model folder, that a path means."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from asd_megatron.checkpoint import lineage
from asd_megatron.checkpoint.huggingface import CONFIG
from asd_megatron.errors import UserError, hub_hint
from asd_megatron.files import user_error

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
METADATA = ".metadata"
_FORMS = (
    "a checkpoint has .metadata and .distcp files (RUN/checkpoints/step_NNNNNN, or iter_NNNNNNN of Megatron-LM with "
    "`--ckpt-format torch_dist`), a model folder has config.json"
)


@dataclass(frozen=True)
class Found:
    """A folder, and what it is: a `torch_dist` checkpoint or a Hugging Face model folder."""

    kind: Literal["checkpoint", "huggingface"]
    folder: Path


def find(path: str | Path) -> Found:
    """What `path` means: a checkpoint or a model folder itself; the newest checkpoint of a run, of its `checkpoints`
    folder or of a Megatron-LM `--save` folder. Raises UserError for anything else."""
    path = Path(path)
    with user_error(f"{path} cannot be read", "check the path and its permissions"):
        if not path.is_dir():
            raise UserError(f"{path} is no folder (from {Path.cwd()}): {_FORMS}{hub_hint(path)}")
        if (path / METADATA).exists():
            return Found("checkpoint", path)
        if (path / CONFIG).exists():
            return Found("huggingface", path)
        if (path / TRACKER).is_file():
            return Found("checkpoint", _of_megatron(path))
        for folder in (path, path / "checkpoints"):
            newest = lineage.latest(folder)
            if newest is not None:
                return Found("checkpoint", newest)
        if any(path.glob("mp_rank_*")):
            raise UserError(
                f"{path} is in Megatron-LM's old format (mp_rank_* folders): let Megatron-LM convert it with "
                "`--ckpt-convert-format torch_dist --ckpt-convert-save FOLDER`, and give that FOLDER"
            )
    raise UserError(f"{path} is neither a checkpoint nor a model folder: {_FORMS}")


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint's folder that `path` means. Raises UserError for anything else."""
    found = find(path)
    if found.kind != "checkpoint":
        raise UserError(f"{path} is a Hugging Face model folder, not a checkpoint: {_FORMS}")
    return found.folder


def _of_megatron(path: Path) -> Path:
    """The folder that the tracker file of a Megatron-LM `--save` folder names."""
    named = (path / TRACKER).read_bytes()[:100].decode(errors="replace").strip()
    name = RELEASE if named == RELEASE else f"iter_{int(named):07d}" if named.isascii() and named.isdigit() else None
    if name is None or not (path / name).is_dir():
        raise UserError(f"{path / TRACKER} names {named!r}, which is no checkpoint in {path}: give the folder itself")
    return find(path / name).folder

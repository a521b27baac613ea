"""The training checkpoints of a run folder: their names, the newest one, and the removal of those that are superseded.

    CHECKPOINTS/step_000060/   complete: written aside, then renamed; a folder without run_state.json is none
    CHECKPOINTS/latest         the name of the checkpoint that the run continues from

A checkpoint with a higher number than `latest` is of a branch that was abandoned when the run was resumed from an older
one. The first save after that removes it:

    20, 40, 60    resumed from 20: `latest` names 20    30 is saved: 20, 30
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

from asd_megatron.errors import UserError
from asd_megatron.files import atomic_write, remove_folder, user_error

log = logging.getLogger(__name__)

RUN_STATE = "run_state.json"
LATEST = "latest"
_NAME = re.compile(r"step_(\d{6,})")


def latest(folder: str | Path) -> Path | None:
    """The newest complete checkpoint of a run's `checkpoints` folder, None when there is none."""
    found = named(folder)
    if found is not None and not (found / RUN_STATE).is_file():
        raise _no_checkpoint(found.parent, found.name)
    return found


def named(folder: str | Path) -> Path | None:
    """As `latest`, whatever has become of that checkpoint since it was written."""
    folder = Path(folder)
    text = _named(folder)
    if text is None:
        return None
    if not _NAME.fullmatch(text):
        raise _no_checkpoint(folder, text)
    return folder / text


def _no_checkpoint(folder: Path, text: str) -> UserError:
    return UserError(
        f"{folder / LATEST} names {text!r}, which is no checkpoint in {folder}: "
        "write the name of one that is into it, or remove it to start from step 1"
    )


def before(checkpoint: Path) -> list[Path]:
    """The checkpoints beside this one that are older, of its branch therefore, the newest first."""
    step = step_of(checkpoint.name)
    found = _steps(checkpoint.parent)
    return [found[other] for other in sorted(found, reverse=True) if other < step]


def all_of(folder: str | Path) -> list[Path]:
    """The checkpoints of a run's `checkpoints` folder, those of abandoned branches too, the oldest first."""
    found = _steps(Path(folder))
    return [found[step] for step in sorted(found)]


def name_latest(folder: str | Path, checkpoint: str) -> None:
    """Make `checkpoint` the one that `latest` finds in a run's `checkpoints` folder: the run resumes from it."""
    folder = Path(folder)
    write_latest(folder, checkpoint)
    number = _number(checkpoint)
    later = [name(step) for step in sorted(_steps(folder)) if number is not None and step > number]
    if later:
        log.warning(
            "the run resumes from %s: its next checkpoint replaces the later ones in %s (%s); move them to keep them",
            checkpoint,
            folder,
            ", ".join(later),
        )


def name(step: int) -> str:
    """The folder name of a step's checkpoint."""
    return f"step_{step:06d}"


def _number(checkpoint: str) -> int | None:
    """The step of a checkpoint's folder name; None for another name."""
    match = _NAME.fullmatch(checkpoint)
    return None if match is None else int(match[1])


def step_of(checkpoint: str) -> int:
    """The step of a checkpoint's folder name; 0 for another name."""
    return _number(checkpoint) or 0


def is_one_of_a_run(path: Path) -> bool:
    """Whether `path` has the name of a checkpoint and the place of one, beside `latest`, whatever is in it."""
    return _number(path.name) is not None and (path.parent / LATEST).is_file()


def _named(folder: Path) -> str | None:
    """What `latest` holds, None when there is no such file."""
    with user_error(f"{folder / LATEST} cannot be read", "check the run folder's permissions"):
        try:
            return (folder / LATEST).read_bytes()[:100].decode(errors="replace").strip()
        except (FileNotFoundError, NotADirectoryError):
            return None


def latest_step(folder: Path) -> int:
    """The step that `latest` names; 0 when it names none."""
    return step_of(_named(folder) or "")


def write_latest(folder: Path, checkpoint: str) -> None:
    """Write the file `latest`, atomically."""
    atomic_write(folder / LATEST, checkpoint + "\n")


def _steps(folder: Path) -> dict[int, Path]:
    """The checkpoints of a folder by step; {} without a folder."""
    if not folder.is_dir():
        return {}
    found = {_number(path.name): path for path in folder.iterdir() if path.is_dir()}
    return {step: path for step, path in found.items() if step is not None}


def prune(folder: Path, step: int, previous: int, keep: int, keep_every: int = 0) -> None:
    """After the save of `step` by a run that continued from `previous`: remove what follows `previous` (another
    branch's) and the oldest checkpoints, never the one just written, and of this branch none of a step that is a
    multiple of `keep_every`. What cannot be removed stays, with a warning."""
    others = {s: path for s, path in _steps(folder).items() if s != step}
    own = sorted(s for s in others if s <= min(previous, step))
    abandoned = sorted(others.keys() - set(own))
    if abandoned:
        log.warning("removing the checkpoints of an abandoned branch: %s", ", ".join(name(s) for s in abandoned))
    superseded = [s for s in own[: max(0, len(own) - (keep - 1))] if not keep_every or s % keep_every]
    for s in (*abandoned, *superseded):
        try:
            remove_folder(others[s])
        except OSError as error:
            log.warning("the old checkpoint %s cannot be removed: %s", others[s], error)

"""The run folder: locked by one running program at a time, and the kind of start that its content allows.

    empty                                          fresh: the run starts, from `checkpoint.resume` PATH if one is given
    this run, stopped before its first checkpoint  restart: the attempt's metrics and dumps are replaced
    this run, with a checkpoint                    resume: from the newest one, or once from the one that is asked for
    this run, complete                             finished: nothing to do
    anything else                                  refused; with `run.overwrite`, overwrite: everything is replaced

Global rank 0 alone works here; what it decides (`Start`) is told to every rank.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from asd_megatron import locks
from asd_megatron.checkpoint import lineage
from asd_megatron.checkpoint.huggingface import CONFIG, is_complete
from asd_megatron.config import AnyRecipe, Recipe, dump_recipe
from asd_megatron.config.yaml_text import read_yaml
from asd_megatron.distributed.rank_log import LOGS
from asd_megatron.errors import UserError
from asd_megatron.files import PARTIAL, atomic_write, remedy, remove_partial, system_reason
from asd_megatron.observe.expert_load import EXPERT_LOAD_FILE
from asd_megatron.run.changes import Change, changes, not_accepted
from asd_megatron.run.continual import Origin, find_origin
from asd_megatron.run.history import HISTORY_FILE, read_history, record

LOCK_FILE, RECIPE_FILE, SUMMARY_FILE = ".lock", "recipe.yaml", "summary.json"
STOP_FILE = "stop"
"""Asks the run to stop; removed when it stops and when it starts."""
CHECKPOINTS, EXPORTS, PROFILE, EVALUATION = "checkpoints", "hf", "profile", "evaluation"
# What an attempt leaves beside recipe and history. Exports and checkpoints are not replaced with it, nor are the ranks'
# logs, which say why it ended.
OF_AN_ATTEMPT = (
    "environment.json", "metrics.jsonl", EXPERT_LOAD_FILE, "tensorboard", "rollouts", "servers", SUMMARY_FILE,
    "curves.png", PROFILE, EVALUATION,
)  # fmt: skip

Kind = Literal["fresh", "restart", "resume", "overwrite", "finished"]
BEGINNINGS = ("fresh", "restart", "overwrite")
"""The starts from step 1, or from another run's checkpoint."""


@dataclass(frozen=True)
class Start:
    """The decision about the run folder. `checkpoint`: the training checkpoint to load, of this run folder for
    `resume` and of another for `fresh`, `restart` and `overwrite`. `changes`: recipe keys that differ from the run that
    is resumed or restarted. `returned_to`: the checkpoint of `checkpoint.resume`, when the run has returned to it
    before and continues from a newer one. `origin`: of `checkpoint.continual_from`, for a run that begins. `damaged`:
    newer checkpoints of the run that are damaged, and how."""

    kind: Kind
    checkpoint: str | None = None
    changes: tuple[Change, ...] = ()
    returned_to: str | None = None
    origin: Origin | None = None
    damaged: tuple[tuple[str, str], ...] = ()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise an OSError from inside, while `path` of the run folder is written, as a UserError."""
    try:
        yield
    except OSError as error:
        text = f"{path} cannot be written ({system_reason(error)}): {remedy(error)}, then start the same command again"
        raise UserError(text) from error


# ---------------------------------------------------------------- locking


def hold(folder: Path, closing: ExitStack) -> None:
    """Make the run folder if it is not there, and hold its lock until `closing` closes; a folder that is then still
    empty is removed. Raises UserError when it cannot be made, or is held by another run."""
    made: list[Path] = []
    try:
        made = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
        folder.mkdir(parents=True, exist_ok=True)
        closing.callback(_remove_empty, made)
        closing.enter_context(locks.locked(folder / LOCK_FILE, partial(in_use, folder)))
        closing.callback(_remove_lock, folder)
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        verb = "made" if folder in made or not os.path.isdir(folder) else "written to"
        raise unusable(folder, verb, error) from None


def in_use(folder: Path, holder: str) -> str:
    """The refusal of a run folder that `holder` has locked."""
    return (
        f"the run folder {folder} is in use by another run ({holder}): wait for it, end it, or choose another"
        " run.name or run.folder"
    )


def unusable(folder: Path, verb: str, error: OSError | ValueError) -> UserError:
    """The refusal of a run folder that the operating system does not let be `verb`: made, read, written to."""
    why = system_reason(error) if isinstance(error, OSError) else error
    return UserError(
        f"the run folder {folder} cannot be {verb} ({why}): choose another run.name or run.folder, or change"
        " permissions there"
    )


def _remove_lock(folder: Path) -> None:
    with suppress(OSError):
        (folder / LOCK_FILE).unlink()


def _remove_empty(made: list[Path]) -> None:
    """Remove folders, inner ones first, up to the first that holds something."""
    with suppress(OSError):
        for path in made:
            path.rmdir()


# ---------------------------------------------------------------- deciding


def claim(recipe: AnyRecipe, stage: str, closing: ExitStack) -> Start:
    """Hold the run folder until `closing` closes, and decide what this start does with it; `prepare` does it. Raises
    UserError for a folder that cannot be made, is in use or holds something else, and for changed settings that would
    falsify the run's record."""
    hold(recipe.run.path, closing)
    return decide(recipe, stage)


def decide(recipe: AnyRecipe, stage: str) -> Start:
    """The decision of `claim`, about a folder that need not be there or be locked. Writes nothing. Raises UserError as
    `claim` does, and for a folder that cannot be read."""
    try:
        start = _decide(recipe, stage)
        return replace(start, origin=find_origin(recipe, stage)) if start.kind in BEGINNINGS else start
    except OSError as error:
        raise unusable(recipe.run.path, "read", error) from None


def _decide(recipe: AnyRecipe, stage: str) -> Start:
    folder, asked = recipe.run.path, recipe.checkpoint.resume
    given = None if asked in ("auto", "never") else Path(asked)
    returned_to = None
    if given is not None and _has_returned(folder, given):
        given, returned_to = None, asked  # the same command again: the run continues from its newest checkpoint
    if given is not None and not given.is_dir():
        raise UserError(f"checkpoint.resume: {asked} is not a folder; give a checkpoint's folder, auto or never")
    elsewhere = asked if given is not None and not _inside(given, folder) else None
    own = returned_to is not None or given is not None and elsewhere is None
    if not _entries(folder):
        return Start("fresh", elsewhere)
    newest = None if asked == "never" else lineage.named(folder / CHECKPOINTS)
    recorded = None if asked == "never" else _recorded(recipe, elsewhere, newest)
    if recorded is None:
        _check_overwrite(recipe)
        return Start("overwrite", elsewhere)
    found = tuple(changes(recorded, recipe))
    checkpoint = newest if given is None or elsewhere is not None else given
    if _complete(recipe):
        if recipe.run.overwrite and checkpoint == newest and not own:  # a named checkpoint is not to be removed
            _check_overwrite(recipe)
            return Start("overwrite", elsewhere)
        if checkpoint == newest and not _export_is_missing(recipe, newest):
            _refuse(recipe, found, stage)
            return Start("finished", None, found)
    if checkpoint is None and recipe.run.overwrite:
        _check_overwrite(recipe)
        return Start("overwrite", elsewhere)
    _refuse(recipe, found, stage)
    if checkpoint is None:
        _check_restart(recipe)
        return Start("restart", elsewhere, found)
    return Start("resume", str(checkpoint), found, None if is_asked(recipe, str(checkpoint)) else returned_to)


def _inside(checkpoint: Path, folder: Path) -> bool:
    return checkpoint.resolve().parent == (folder / CHECKPOINTS).resolve()


def _has_returned(folder: Path, given: Path) -> bool:
    """Whether the run has already returned to its checkpoint `given`, which may have been pruned since, and has a
    checkpoint to continue from."""
    if "\0" in str(given) or not _inside(given, folder) or lineage.latest(folder / CHECKPOINTS) is None:
        return False
    returns: set[str] = set()  # names of checkpoints of the present branch
    for event in read_history(folder):
        name = Path(str(event.get("checkpoint"))).name
        if event.get("event") in BEGINNINGS:
            returns.clear()
        elif event.get("event") == "resume":
            returns = {other for other in returns if lineage.step_of(other) <= lineage.step_of(name)}
            if event.get("returned") is True:
                returns.add(name)
    return given.resolve().name in returns


def is_asked(recipe: AnyRecipe, checkpoint: str) -> bool:
    """Whether `checkpoint.resume` names this checkpoint."""
    asked = recipe.checkpoint.resume
    return asked not in ("auto", "never") and os.path.realpath(asked) == os.path.realpath(checkpoint)


def check_step_left(recipe: AnyRecipe, start: Start, step: int) -> None:
    """Raise UserError when the checkpoint that `start` loads, the state after `step` steps, leaves nothing to do."""
    steps = recipe.run.steps
    if step > steps or step == steps and start.kind != "resume":
        raise UserError(
            f"checkpoint.resume: {start.checkpoint} is the state after step {step} and run.steps is {steps}, so there"
            f" is no step left: set run.steps above {step}, or checkpoint.resume never and another run.name"
        )


def _entries(folder: Path) -> list[str]:
    with suppress(FileNotFoundError):
        return [name for name in os.listdir(folder) if name not in (LOCK_FILE, LOGS) and not name.endswith(PARTIAL)]
    return []


def _recorded(recipe: AnyRecipe, elsewhere: str | None, newest: Path | None) -> Mapping[str, Any] | None:
    """The recipe that the folder's run was last started with; None when the folder holds no run that this start could
    be about: no run at all, or one that started from another checkpoint than `elsewhere`."""
    folder = recipe.run.path
    if newest is None and not (folder / HISTORY_FILE).is_file():
        return None
    there = (folder / RECIPE_FILE).is_file()
    if newest is None and not there and all("event" in line for line in read_history(folder)):
        return recipe.model_dump(mode="json")  # a full disk, or a kill, ended the first start before it was recorded
    found = read_yaml(folder / RECIPE_FILE, "recorded recipe") if there else {}
    if not isinstance(found, dict):
        raise UserError(f"{folder / RECIPE_FILE} is no recipe: choose another run.name, or set run.overwrite true")
    if elsewhere is not None:
        begun = [event for event in read_history(folder) if event.get("event") in BEGINNINGS]
        if not begun or begun[-1].get("checkpoint") != os.path.realpath(elsewhere):
            return None
    return found


def _summary(folder: Path) -> Mapping[str, Any]:
    try:
        found = json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _complete(recipe: AnyRecipe) -> bool:
    summary = _summary(recipe.run.path)
    return summary.get("completed") is True and summary.get("steps") == recipe.run.steps


def _export_is_missing(recipe: AnyRecipe, newest: Path | None) -> bool:
    """Whether the export of the last step was asked for, is not there, and can be made."""
    last = recipe.run.steps
    if newest is None or newest.name != lineage.name(last) or not recipe.checkpoint.export_at_end:
        return False
    return not is_exported(recipe.run.path, last, newest)


def checkpoint_folder(folder: Path, step: int) -> Path:
    """RUN/checkpoints/step_NNNNNN."""
    return folder / CHECKPOINTS / lineage.name(step)


def export_folder(folder: Path, step: int) -> Path:
    """RUN/hf/step_NNNNNN."""
    return folder / EXPORTS / lineage.name(step)


def is_exported(folder: Path, step: int, checkpoint: Path) -> bool:
    """Whether the export of `step` is complete and of this branch: not older than the checkpoint of that step."""
    export = export_folder(folder, step)
    written = checkpoint / lineage.RUN_STATE
    if not is_complete(export):
        return False
    return not written.is_file() or (export / CONFIG).stat().st_mtime >= written.stat().st_mtime


def _refuse(recipe: AnyRecipe, found: tuple[Change, ...], stage: str) -> None:
    """Raise UserError for changes that would falsify the record."""
    folder = recipe.run.path
    started = next((event["stage"] for event in read_history(folder) if "stage" in event), stage)
    if started != stage:
        raise UserError(
            f"the run folder {folder} holds a run of `asd-megatron {started}`: choose another run.name or run.folder"
        )
    refused = not_accepted(found, recipe.checkpoint.accept_changes)
    if refused:
        keys = ", ".join(change.key for change in refused)
        raise UserError(
            f"the run folder {folder} was started with other settings ({'; '.join(map(str, refused))}): set them back,"
            " or choose another run.name; to change them in the middle of this run, set checkpoint.accept_changes"
            f" [{keys}]; to start from step 1 in this folder, set run.overwrite true and checkpoint.resume never"
        )


def _check_restart(recipe: AnyRecipe) -> None:
    """Refuse (UserError) to restart a run that has ended without a checkpoint: its results would be replaced."""
    steps = _summary(recipe.run.path).get("steps")
    if steps is not None:
        raise UserError(
            f"the run in {recipe.run.path} ended after step {steps} and left no checkpoint to continue from: choose"
            " another run.name, or set run.overwrite true to start from step 1"
        )


def _check_overwrite(recipe: AnyRecipe) -> None:
    """Refuse (UserError) to replace a folder without `run.overwrite`, one that is no run folder, or one with files that
    the run reads."""
    folder = recipe.run.path
    if not recipe.run.overwrite:
        raise UserError(
            f"the run folder {folder} is not empty: choose another run.name or run.folder, or set run.overwrite true"
        )
    if not any((folder / name).is_file() for name in (RECIPE_FILE, HISTORY_FILE)):
        raise UserError(f"run.overwrite: {folder} holds no {RECIPE_FILE}, so it is no run folder; it is left alone")
    for key, path in _inputs(recipe).items():
        if Path(path).resolve().is_relative_to(folder.resolve()):
            raise UserError(f"run.overwrite would remove {folder} with {key} {path} in it: choose another run.name")


def _inputs(recipe: AnyRecipe) -> dict[str, str]:
    """The files and folders that the recipe reads, by key (built-in names are never inside a run folder)."""
    found: dict[str, str | None] = {
        "model.path": recipe.model.path,
        **{f"data.train{f' ({i})' if i else ''}": given.path for i, given in enumerate(recipe.data.train_sets)},
        "data.test": recipe.data.test,
        "checkpoint.resume": recipe.checkpoint.resume,
        "checkpoint.continual_from": recipe.checkpoint.continual_from,
    }
    found |= {f"evaluation.sets.{name}": given.data for name, given in recipe.evaluation.sets.items()}
    if isinstance(recipe, Recipe):
        found["rollout.replay_folder"] = recipe.rollout.replay_folder
    return {key: path for key, path in found.items() if path is not None}


# ---------------------------------------------------------------- preparing


def prepare(recipe: AnyRecipe, start: Start, stage: str, step: int) -> None:
    """Prepare the locked folder for a run that continues after `step` steps: remove what is replaced and what killed
    writers left, record the start in the history, write the resolved recipe. A run without a step left (its export is
    missing) keeps its recipe and summary. Raises UserError when the operating system refuses."""
    folder = recipe.run.path
    with writing(folder):
        if start.kind == "overwrite":
            for name in (*_entries(folder), LOGS):
                _remove(folder / name)
        if start.kind == "restart":
            for name in OF_AN_ATTEMPT:
                _remove(folder / name)
        (folder / STOP_FILE).unlink(missing_ok=True)
        for part in (".", CHECKPOINTS, EXPORTS, "rollouts", PROFILE):
            remove_partial(folder / part)
        if start.kind == "resume" and start.checkpoint is not None:
            # It may be an older one: from now on it is the run's newest.
            lineage.name_latest(folder / CHECKPOINTS, Path(start.checkpoint).resolve().name)
        for checkpoint, problem in start.damaged:
            record(folder, "fallback", step, damaged=checkpoint, reason=problem)
        origin = None if start.checkpoint is None else os.path.realpath(start.checkpoint)
        back = start.kind == "resume" and start.checkpoint is not None and is_asked(recipe, start.checkpoint)
        other: dict[str, Any] = {"returned": True} if back else {}
        if start.origin is not None:
            other["continual_from"] = start.origin.record()
        record(folder, start.kind, step, stage=stage, checkpoint=origin, **other)
        if step < recipe.run.steps:
            (folder / SUMMARY_FILE).unlink(missing_ok=True)
            for change in start.changes:
                record(folder, "change", step, key=change.key, old=change.old, new=change.new)
            atomic_write(folder / RECIPE_FILE, dump_recipe(recipe))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

"""What a start does with the run folder, in words: of a run that begins, and of a dry run, which writes nothing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from asd_megatron import locks
from asd_megatron.checkpoint import lineage
from asd_megatron.checkpoint.run_state import RunStateFile
from asd_megatron.checkpoint.verification import damage_by_size
from asd_megatron.config import AnyRecipe
from asd_megatron.errors import UserError, plural
from asd_megatron.observe.writer import read_metrics
from asd_megatron.run.changes import SCHEDULE_KEYS, Change
from asd_megatron.run.copies import check_missing, needed_copies
from asd_megatron.run.folder import (
    LOCK_FILE,
    SUMMARY_FILE,
    Start,
    check_step_left,
    decide,
    export_folder,
    in_use,
    unusable,
)
from asd_megatron.run.model import updates_per_step
from asd_megatron.run.resuming import fall_back


def preview(recipe: AnyRecipe, stage: str) -> Start:
    """The `Start` that a run of the recipe would have now. Raises UserError for what the run would refuse. Writes
    nothing."""
    folder = recipe.run.path
    _check_usable(folder)
    try:
        holder = locks.holder(folder / LOCK_FILE)
    except OSError as error:
        raise unusable(folder, "written to", error) from None
    if holder is not None:
        raise UserError(in_use(folder, holder))
    start = decide(recipe, stage)
    while start.kind == "resume" and start.checkpoint is not None:
        damage = damage_by_size(Path(start.checkpoint))
        if damage is None:
            break
        start, _ = fall_back(recipe, start, damage)
    if start.checkpoint is not None:
        if not (Path(start.checkpoint) / lineage.RUN_STATE).is_file():
            raise UserError(
                f"checkpoint.resume: {start.checkpoint} is no training checkpoint ({lineage.RUN_STATE} is missing):"
                " give a folder checkpoints/step_NNNNNN of a run"
            )
        if step := lineage.step_of(Path(start.checkpoint).resolve().name):
            check_step_left(recipe, start, step)
        if needed_copies(recipe):
            check_missing(recipe, Path(start.checkpoint), RunStateFile.read(Path(start.checkpoint)).copies)
    return start


def _check_usable(folder: Path) -> None:
    """Raise UserError unless the folder is there and can be written to, or can be made."""
    try:
        os.lstat(folder)
        found = folder
    except FileNotFoundError:
        found = next(path for path in folder.absolute().parents if path.exists())
    except (OSError, ValueError) as error:
        raise unusable(folder, "made", error) from None
    verb = "written to" if found == folder else "made"
    if not found.is_dir():
        raise unusable(folder, "made", NotADirectoryError(0, f"{found} is not a folder"))
    if not os.access(found, os.W_OK | os.X_OK):
        raise unusable(folder, verb, PermissionError(0, f"no permission to write to {found}"))


def start_text(recipe: AnyRecipe, start: Start) -> str:
    """What becomes of the run folder, one line or several, with the settings that differ from its run's."""
    folder, steps = recipe.run.path, recipe.run.steps
    if start.kind == "finished":
        return finished_text(recipe, start.changes)
    origin = f", from the weights and the optimizer of {start.checkpoint}" if start.checkpoint is not None else ""
    if start.origin is not None:
        origin = f", from the {start.origin}"
    step = lineage.step_of(Path(start.checkpoint).resolve().name) if start.checkpoint is not None else 0
    text = {
        "fresh": f"{folder}: new{origin}",
        "overwrite": f"{folder}: its content would be removed (run.overwrite true), and a new run would start{origin}",
        "restart": f"{folder}: its run stopped before the first checkpoint, and would start again from step 1{origin}",
        "resume": f"{folder}: its run would be resumed from step {step} of {steps} ({start.checkpoint})",
    }[start.kind]
    if start.kind == "resume" and step == steps:
        text = f"{folder}: its run is complete, and its missing export would be written from {start.checkpoint}"
    text += "".join(f"\n{problem}" for _, problem in start.damaged)
    if start.changes:
        text += f"\nsettings that differ from that run's: {'; '.join(map(str, start.changes))}"
    return text


def beginning_lines(recipe: AnyRecipe, start: Start, done: int, notes: Sequence[str], rate: float) -> list[str]:
    """The console's lines of a run that begins after `done` steps: a replaced earlier attempt, `notes`, changed
    settings, the learning `rate` of its first step where they change the schedule."""
    folder, steps, changes = recipe.run.path, recipe.run.steps, start.changes
    lines = []
    if start.kind == "restart":
        lines.append(f"the run in {folder} stopped before its first checkpoint: it starts again from step 1")
    if start.returned_to is not None:
        lines.append(
            f"the run has returned to checkpoint.resume {start.returned_to} before: it continues after step {done}"
        )
    lines += notes
    if changes:
        lines.append(f"settings changed after step {done}: {'; '.join(map(str, changes))}")
    if 0 < done < steps and any(change.key in SCHEDULE_KEYS for change in changes):
        before = [row.get("optimizer/learning_rate") for row in read_metrics(folder) if row["step"] == done]
        lines.append(
            f"learning rate: {recipe.optimizer.schedule} schedule over {plural(steps, 'step')} of"
            f" {plural(updates_per_step(recipe), 'update')}, {rate:.3g} at step {done + 1}"
            + "".join(f" ({old:.3g} at step {done})" for old in before if old is not None)
        )
    return lines


def finished_text(recipe: AnyRecipe, changes: Sequence[Change]) -> str:
    """That nothing is left to do, where the results are, and which of the recipe's settings were ignored."""
    folder, steps = recipe.run.path, recipe.run.steps
    results = {"model": export_folder(folder, steps), "curves": folder / "curves.png", "summary": folder / SUMMARY_FILE}
    lines = [f"the run in {folder} is finished after {plural(steps, 'step')}: nothing is left to do"]
    lines += [f"  {name + ':':<9}{path if path.exists() else 'none'}" for name, path in results.items()]
    if changes:
        lines.append(f"  ignored:  settings that differ from the run's: {'; '.join(map(str, changes))}")
    again = "run.overwrite true and checkpoint.resume never"
    lines.append(f"for more steps raise run.steps; to train from step 1 again set {again}")
    return "\n".join(lines)

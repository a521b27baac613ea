"""What a run that did not reach its end says: what was kept, and the command that continues it."""

from __future__ import annotations

import os
import sys

from asd_megatron.checkpoint import lineage
from asd_megatron.config import AnyRecipe
from asd_megatron.distributed.first_error import claim_once
from asd_megatron.distributed.launcher import COMMAND, launcher_reports
from asd_megatron.files import utc_now
from asd_megatron.observe.progress import print_line
from asd_megatron.run.folder import BEGINNINGS, CHECKPOINTS
from asd_megatron.run.history import read_history


def ended_text(how: str, recipe: AnyRecipe, command: str, since: str) -> str:
    """One line about a run that was started by `command` at `since` (a time of `utc_now`) and has not reached its end:
    `how` it ended (`interrupted`), what is kept of it, and how to continue."""
    folder = recipe.run.path
    starts = [event for event in read_history(folder) if event.get("event") in (*BEGINNINGS, "resume")]
    if not starts or str(starts[-1].get("time_utc")) < since:
        return f"{how} before the run began: nothing is lost, {folder} is as it was; to start the run: {command}"
    again = continuing(recipe, command)
    newest = lineage.latest(folder / CHECKPOINTS)
    if newest is None:
        every = recipe.checkpoint.every
        when = f"the first is due after step {every}" if every else "checkpoint.every is 0"
        return f"{how}: there is no checkpoint in {folder} yet ({when}); to start from step 1 again: {again}"
    step = lineage.step_of(newest.name)
    return f"{how}: the checkpoint of step {step} is kept ({newest}); to continue from there: {again}"


def continuing(recipe: AnyRecipe, command: str) -> str:
    """The command that continues a run that was started by `command`."""
    return f"{command} --checkpoint.resume auto" if recipe.checkpoint.resume == "never" else command


def own_command() -> str:
    """The command that the user started this run with, for messages."""
    return os.environ.get(COMMAND, "the same command")


class Interruption:
    """Called when a signal ends this rank at once: tells the user what was kept. Among several ranks one does; under
    `asd-megatron train` the launcher does, after they have ended."""

    def __init__(self, recipe: AnyRecipe) -> None:
        self.recipe, self.since = recipe, utc_now()

    def __call__(self) -> None:
        if not launcher_reports(os.environ):
            claim_once("interruption_told", self._tell)

    def _tell(self) -> None:
        print_line(ended_text("interrupted", self.recipe, own_command(), self.since), sys.stderr)

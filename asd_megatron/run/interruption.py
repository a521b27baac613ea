"""What a run that was interrupted (Ctrl-C, SIGINT) says: what was kept, and the command that continues it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from asd_megatron.checkpoint import lineage
from asd_megatron.config import AnyRecipe
from asd_megatron.distributed.first_error import report_once
from asd_megatron.distributed.launcher import COMMAND, LAUNCHER
from asd_megatron.files import utc_now
from asd_megatron.observe.progress import print_line
from asd_megatron.run.folder import BEGINNINGS, CHECKPOINTS, read_history


def interrupted_text(recipe: AnyRecipe, command: str, since: str) -> str:
    """One line about a run that was started by `command` at `since` (a time of `utc_now`) and was interrupted."""
    folder = recipe.run.path
    starts = [event for event in read_history(folder) if event.get("event") in (*BEGINNINGS, "resume")]
    if not starts or str(starts[-1].get("time_utc")) < since:
        return f"interrupted before the run began: {folder} is as it was; to start the run: {command}"
    again = f"{command} --checkpoint.resume auto" if recipe.checkpoint.resume == "never" else command
    newest = lineage.latest(folder / CHECKPOINTS)
    if newest is None:
        every = recipe.checkpoint.every
        when = f"the first is due after step {every}" if every else "checkpoint.every is 0"
        return f"interrupted: there is no checkpoint in {folder} yet ({when}); to start from step 1 again: {again}"
    step = lineage.step_of(newest.name)
    return f"interrupted: the checkpoint of step {step} is kept ({newest}); to continue from there: {again}"


class Interruption:
    """Tells the user once about an interruption of this rank. Among several ranks one does; under `asd-megatron train`
    the launcher does, after they have ended."""

    def __init__(self, recipe: AnyRecipe) -> None:
        self.recipe, self.since, self.said = recipe, utc_now(), False

    @contextmanager
    def told(self) -> Iterator[None]:
        try:
            yield
        except KeyboardInterrupt:
            if not self.said:
                self.said = True
                self._tell()
            raise

    def _tell(self) -> None:
        launched = LAUNCHER in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
        command = os.environ.get(COMMAND, "the same command")
        text = interrupted_text(self.recipe, command, self.since)
        # The claim keeps ranks whose collectives break now from reporting that as the cause.
        report_once("interrupted", lambda: None if launched else print_line(text, sys.stderr))

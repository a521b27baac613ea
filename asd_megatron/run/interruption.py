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
    again = continuing(recipe, command)
    newest = lineage.latest(folder / CHECKPOINTS)
    if newest is None:
        every = recipe.checkpoint.every
        when = f"the first is due after step {every}" if every else "checkpoint.every is 0"
        return f"interrupted: there is no checkpoint in {folder} yet ({when}); to start from step 1 again: {again}"
    step = lineage.step_of(newest.name)
    return f"interrupted: the checkpoint of step {step} is kept ({newest}); to continue from there: {again}"


def continuing(recipe: AnyRecipe, command: str) -> str:
    """The command that continues a run that was started by `command`."""
    return f"{command} --checkpoint.resume auto" if recipe.checkpoint.resume == "never" else command


def own_command() -> str:
    """The command that the user started this run with, for messages."""
    return os.environ.get(COMMAND, "the same command")


class Interruption:
    """Tells the user once about an interruption of this rank, after the run is closed: a checkpoint in flight is kept
    then. Among several ranks one does; under `asd-megatron train` the launcher does, after they have ended."""

    def __init__(self, recipe: AnyRecipe) -> None:
        self.recipe, self.since = recipe, utc_now()
        self._claimed = self._tells = False

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Around the program, inside `told`: ranks whose collectives break while this one is closing do not report that
        as the cause."""
        try:
            yield
        except KeyboardInterrupt:
            self._claim()
            raise

    @contextmanager
    def told(self) -> Iterator[None]:
        """Around the program and its closing."""
        try:
            with self.claimed():
                yield
        finally:
            if self._tells:
                print_line(interrupted_text(self.recipe, own_command(), self.since), sys.stderr)

    def _claim(self) -> None:
        if not self._claimed:
            self._claimed = True
            launched = LAUNCHER in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
            report_once("interrupted", lambda: setattr(self, "_tells", not launched))

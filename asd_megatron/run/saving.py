"""The training checkpoints of a run: writing them, in the foreground or in the background, and which is the newest.

A save that the operating system refuses (no space, a quota, permissions) does not end the run. It is said in one line
and recorded in history.jsonl, nothing of it stays on the disk, the older checkpoints stay, and the next step tries
again (`Saver.failure`). Only a run that ends without having saved its last step ends with the error.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from asd_megatron.checkpoint import lineage, training
from asd_megatron.checkpoint.background import Background
from asd_megatron.config import AnyRecipe
from asd_megatron.distributed.objects import on_rank_zero
from asd_megatron.errors import UserError, plural
from asd_megatron.models.port import ModelPort
from asd_megatron.models.routing import LoadBalance
from asd_megatron.models.weight_copies import WeightCopies
from asd_megatron.run.folder import CHECKPOINTS, writing
from asd_megatron.run.history import record
from asd_megatron.trainer.optimizer import Optimizer


class Saver:
    """Writes the checkpoints of the program `stage`. With `checkpoint.async_save` one may be in flight between two
    calls.

    newest: step of the run's newest complete checkpoint, 0 without one; the same on every rank. After a save it is
    current once that is settled. seconds: the longest time that a checkpoint has taken from its beginning until it was
    known to be complete. failure: why the latest checkpoint could not be written; None when it was; the same on every
    rank.
    """

    def __init__(
        self,
        recipe: AnyRecipe,
        stage: str,
        port: ModelPort,
        optimizer: Optimizer,
        copies: WeightCopies | None,
        balance: LoadBalance | None,
        *,
        newest: int,
        say: Callable[[str], None],
        before: Callable[[], None],
    ) -> None:
        """say: prints a line on global rank 0's console. before: is called on global rank 0 before each save, which
        fails with its UserError. Collective over all ranks."""
        self.newest = newest
        self.seconds = 0.0
        self.failure: str | None = None
        self._say, self._before = say, before
        self._begun = 0.0
        self._failed = self._untold = 0  # attempts since the last checkpoint, and since `take_failures`
        self._step = 0  # of the latest attempt
        self._recipe, self._stage, self._port, self._optimizer = recipe, stage, port, optimizer
        self._copies, self._balance = copies, balance
        self._background = Background(port.process_groups) if recipe.checkpoint.async_save else None

    def save(self, step: int, run_state: Mapping[str, Any]) -> None:
        """Write the state after `step`; the newest `checkpoint.keep` checkpoints stay. Waits for one in flight. Where
        the operating system refuses, that is told, and `failure` set. Collective."""
        self.settle()
        self._step, self._begun = step, time.monotonic()
        load = {} if self._balance is None else {"expert_load": self._balance.fractions.tolist()}
        try:
            on_rank_zero(self._prepare, self._port.process_groups.host)
            training.save(
                self._recipe.run.path / CHECKPOINTS,
                step,
                self._port,
                self._optimizer.megatron,
                self._optimizer.scheduler,
                {**run_state, **load, **self._optimizer.run_state(), "step": step, "stage": self._stage},
                keep=self._recipe.checkpoint.keep,
                keep_every=self._recipe.checkpoint.keep_every,
                copies=self._copies,
                background=self._background,
            )
        except UserError as error:  # the same on every rank
            self._fail(error)
            return
        if self._background is None or not self._background.step:
            self._complete(step)

    def settle(self, *, wait: bool = True) -> None:
        """Learn what became of the checkpoint in flight, if there is one; with `wait`, after its end. A failure is told
        as by `save`. Collective."""
        if self._background is None:
            return
        try:
            step = self._background.settle(wait=wait)
        except UserError as error:
            self._fail(error)
            return
        if step:
            self._complete(step)

    def finish(self) -> None:
        """At the end of the run, after its last step: UserError, on every rank, if its checkpoint could not be written.
        Collective."""
        self.settle()
        if self.failure is not None:
            raise UserError(f"{self.failure}; {self.newest_text()}: start the same command again to resume from there")

    def take_failures(self) -> int:
        """How many attempts have failed since the last call."""
        taken, self._untold = self._untold, 0
        return taken

    def not_finite(self) -> str | None:
        """A tensor of this rank's part of the optimizer's state, or of a copy of weights, that holds a number that is
        not finite."""
        return training.not_finite(self._port, self._optimizer.megatron, self._copies)

    def _prepare(self) -> None:
        try:
            with writing(self._recipe.run.path):
                self._recipe.run.path.stat()  # a run folder that somebody has removed is not made again
            self._before()
        except UserError as error:
            raise UserError(f"the checkpoint of step {self._step} is not written: {error}") from error

    def _complete(self, step: int) -> None:
        self.newest = step
        self.seconds = max(self.seconds, time.monotonic() - self._begun)
        if self._failed:
            self._say(f"the checkpoint of step {step} is written, after {plural(self._failed, 'failed attempt')}")
        self.failure, self._failed = None, 0

    def _fail(self, error: UserError) -> None:
        """Tell a failed attempt: the first one, and those at steps at which a checkpoint is due anyway."""
        first, self.failure = self.failure is None, str(error)
        self._failed, self._untold = self._failed + 1, self._untold + 1
        every = self._recipe.checkpoint.every
        if first or every and self._step % every == 0:
            self._say(f"warning: {error}. The run continues, and the next step tries again; {self.newest_text()}")
            if self._port.process_groups.host.rank() == 0:
                with suppress(OSError):  # the disk may be full
                    newest = lineage.name(self.newest) if self.newest else None
                    record(self._recipe.run.path, "save_failed", self._step, reason=str(error), newest=newest)

    def newest_text(self) -> str:
        """Which checkpoint is the newest, for messages."""
        if not self.newest:
            return "there is no checkpoint of this run yet"
        return f"the newest checkpoint is {lineage.name(self.newest)}"

    def close(self, say: Callable[[str], None]) -> None:
        """Let a checkpoint in flight be completed, also after an exception."""
        if self._background is not None:
            if self._background.step:
                say(f"waiting for the checkpoint of step {self._background.step} to be written")
            self._background.close()

"""The training checkpoints of a run: writing them, in the foreground or in the background, and which is the newest."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from asd_megatron.checkpoint import lineage, training
from asd_megatron.checkpoint.background import Background
from asd_megatron.config import AnyRecipe
from asd_megatron.models.port import ModelPort
from asd_megatron.models.routing import LoadBalance
from asd_megatron.models.weight_copies import WeightCopies
from asd_megatron.run.folder import CHECKPOINTS
from asd_megatron.trainer.optimizer import Optimizer


class Saver:
    """Writes the checkpoints of the program `stage`. With `checkpoint.async_save` one may be in flight between two
    calls.

    newest: step of the run's newest complete checkpoint, 0 without one; the same on every rank. After a save it is
    current once that is settled. seconds: the longest time that a checkpoint has taken from its beginning until it was
    known to be complete.
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
    ) -> None:
        """Collective over all ranks."""
        self.newest = newest
        self.seconds = 0.0
        self._begun = 0.0
        self._recipe, self._stage, self._port, self._optimizer = recipe, stage, port, optimizer
        self._copies, self._balance = copies, balance
        self._background = Background(port.process_groups) if recipe.checkpoint.async_save else None

    def save(self, step: int, run_state: Mapping[str, Any]) -> None:
        """Write the state after `step`; the newest `checkpoint.keep` checkpoints stay. Waits for one in flight.
        Collective."""
        self.settle()
        self._begun = time.monotonic()
        load = {} if self._balance is None else {"expert_load": self._balance.fractions.tolist()}
        training.save(
            self._recipe.run.path / CHECKPOINTS,
            step,
            self._port,
            self._optimizer.megatron,
            self._optimizer.scheduler,
            {**run_state, **load, **self._optimizer.run_state(), "step": step, "stage": self._stage},
            keep=self._recipe.checkpoint.keep,
            copies=self._copies,
            background=self._background,
        )
        if self._background is None or not self._background.step:
            self._complete(step)

    def settle(self, *, wait: bool = True) -> None:
        """Learn what became of the checkpoint in flight, if there is one; with `wait`, after its end. Raises its error,
        a UserError where the operating system refused. Collective."""
        if self._background is not None:
            step = self._background.settle(wait=wait)
            if step:
                self._complete(step)

    def _complete(self, step: int) -> None:
        self.newest = step
        self.seconds = max(self.seconds, time.monotonic() - self._begun)

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

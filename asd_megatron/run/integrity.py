"""What a run checks of its own state: equal copies on all ranks, spikes of the gradient norm."""

from __future__ import annotations

import math
from collections.abc import Callable

from asd_megatron.config import AnyRecipe
from asd_megatron.errors import ReplicasDiffer
from asd_megatron.models.port import ModelPort
from asd_megatron.run.clock import Clock
from asd_megatron.run.saving import Saver
from asd_megatron.trainer.optimizer import Optimizer
from asd_megatron.trainer.replicas import Replicas


class Integrity:
    """The checks of one rank's model and optimizer; collective over all ranks unless stated."""

    def __init__(self, recipe: AnyRecipe, port: ModelPort, optimizer: Optimizer, saver: Saver, clock: Clock) -> None:
        self.optimizer, self.saver, self.clock = optimizer, saver, clock
        self.every = recipe.run.replica_check_every
        self.replicas = Replicas(port, optimizer)

    def before_update(self, step: int) -> None:
        """`check`, when the comparison is due before the update of `step`."""
        if self.every and step % self.every == 0 and self.replicas.present:
            with self.clock.seconds("replicas"):
                self.check(f"step {step}, replicas")

    def check(self, where: str) -> None:
        """Raise ReplicasDiffer on every rank when copies differ. where: for the message, the step and what was due."""
        found = self.differing()
        if found is not None:
            self.saver.settle()
            raise ReplicasDiffer(f"{where}: {found}. Nothing of this state is saved; {self.saver.newest_text()}")

    def differing(self) -> str | None:
        """Which copies are not equal and what to do, on every rank; None when all are, and without a comparison where
        `run.replica_check_every` is 0."""
        found = self.replicas.check() if self.every else None
        if found is None:
            return None
        return (
            f"{found}. Ranks that get the same updates hold equal bits: memory or a device has changed them. Start the"
            " same command again, which resumes from the newest checkpoint; if the same rank or host is named again,"
            " leave it out"
        )

    def spike_metrics(self, step: int, say: Callable[[str], None]) -> dict[str, float]:
        """The metrics of the spikes since the last call, {} without a rule for them; `say` is told of each. Not
        collective."""
        rule = self.optimizer.spikes
        if rule is None:
            return {}
        found = rule.take()
        done = "the update is skipped" if rule.action == "skip" else "the gradient is scaled down to it"
        for spike in found:
            say(f"step {step}: gradient norm {spike.norm:.4g} is above the limit {spike.limit:.4g}: {done}")
        return {
            "optimizer/spikes": float(len(found)),
            "optimizer/spike_limit": math.nan if rule.limit is None else rule.limit,
        }

"""Warnings about rollouts that were sampled from another distribution than the trainer's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from asd_megatron.config import Recipe

LARGE_KL = 0.02
"""Nats a token (`mismatch/k3`). bfloat16 on both sides is around 1e-4, FP8 rollouts up to 1e-2."""
SMALL_SAMPLE = 0.9
"""Effective fraction of the tokens (`mismatch/ess`)."""
STEPS_IN_A_ROW = 3


def uncorrected(recipe: Recipe) -> str | None:
    """What to say of quantised rollouts without importance weights; None of other recipes."""
    if recipe.rollout.quantization == "none" or recipe.algorithm.importance_correction != "none":
        return None
    return (
        f"algorithm.importance_correction none with rollout.quantization {recipe.rollout.quantization}: the servers"
        " sample from another distribution than the trainer's, and nothing corrects it. Leave"
        " algorithm.importance_correction out (truncated), and watch mismatch/k3"
    )


@dataclass
class MismatchWarning:
    """Watches `mismatch/*` of a run's steps, in order; warns once. Feed a resumed run the rows of its metrics first."""

    recipe: Recipe
    _in_a_row: int = 0
    _said: bool = False

    def of_step(self, metrics: Mapping[str, float]) -> str | None:
        """The warning, in the step in which `STEPS_IN_A_ROW` steps have had a large mismatch for the first time."""
        kl, sample = metrics.get("mismatch/k3", math.nan), metrics.get("mismatch/ess", math.nan)
        if math.isnan(kl) or math.isnan(sample) or self.recipe.rollout.engine == "replay":
            return None
        large = kl > LARGE_KL or sample < SMALL_SAMPLE
        self._in_a_row = self._in_a_row + 1 if large else 0
        if self._in_a_row < STEPS_IN_A_ROW or self._said:
            return None
        self._said = True
        return (
            f"the engine samples from another distribution than the trainer's: mismatch/k3 is {kl:.3g} nats a token"
            f" and mismatch/ess {sample:.3g}, for {STEPS_IN_A_ROW} steps. {self._remedy()}"
        )

    def _remedy(self) -> str:
        rollout = self.recipe.rollout
        remedies = ["look at weight_sync/probe_mean_abs and at the servers' settings"]
        if rollout.quantization != "none":
            remedies.append("set rollout.quantization none")
        if rollout.overlap or rollout.partial_rollouts:
            remedies.append("lower rollout.max_staleness or optimizer.learning_rate")
        if self.recipe.algorithm.importance_correction == "none":
            remedies.append("set algorithm.importance_correction truncated")
        first, *rest = remedies
        return first.capitalize() + "".join(f"; {remedy}" for remedy in rest)

"""The entropy-triggered gate (Eq. 7, Algorithm 1): calibrated during a warm-up, then a Schmitt trigger on the median
entropy H."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from asd_megatron.antisd.divergence import Condition, resolve_condition
from asd_megatron.errors import UserError


class GateError(UserError, ValueError):
    """Gate settings that contradict each other, or an entropy that cannot be one."""


class Gate:
    """Computes each step's lambda from the step's H, the lower median of the token entropies of the global batch
    (nats).

    * Warm-up: the first `warmup_steps` steps that have an H run with lambda 0. H_warm is the lower median of their H,
      unless given.
    * Afterwards, g = 1 at first; on every step, that one included, g <- 1 if g = 0 and H >= tau_up * H_warm, g <- 0 if
      g = 1 and H < tau_down * H_warm; lambda = g * lambda_max.
    * A step without any counting token (H is None or NaN) changes nothing and does not count as a warm-up step.
    * `gated=False`: no trigger, always open after `warmup_steps` (usually 0).

    `history` are the entropies of the warm-up steps made, `given` is the recipe's H_warm. All ranks hold equal gates
    and update them with the same H. A checkpoint needs `state_dict` alone; the settings come from the recipe. Raises
    GateError for settings that contradict each other.
    """

    def __init__(
        self,
        lambda_max: float,
        warmup_steps: int,
        tau_down: float = 0.93,
        tau_up: float = 1.0,
        h_warm: float | None = None,
        gated: bool = True,
    ) -> None:
        if warmup_steps < 0:
            raise GateError(f"gate.warmup_steps is {warmup_steps}: give 0 or more")
        if gated and warmup_steps == 0 and h_warm is None:
            raise GateError(
                "gate.warmup_steps 0 leaves nothing to calibrate the gate on: give 1 or more warm-up steps, "
                "or gate.h_warm, or take algorithm.name no_gate"
            )
        if h_warm is not None and not (math.isfinite(h_warm) and h_warm > 0):
            raise GateError(f"gate.h_warm is {h_warm}: give a positive entropy in nats, such as 0.71")
        if not 0 < tau_down <= tau_up:
            raise GateError(
                f"gate.tau_down {tau_down} and gate.tau_up {tau_up} are fractions of H_warm: "
                "give 0 < tau_down <= tau_up"
            )
        self.lambda_max = lambda_max
        self.warmup_steps = warmup_steps
        self.tau_down = tau_down
        self.tau_up = tau_up
        self.gated = gated
        self.given = h_warm
        self.recalibrate()

    @classmethod
    def for_condition(
        cls,
        cond: Condition | str,
        *,
        warmup_steps: int,
        lambda_max: float = 0.5,
        tau_down: float = 0.93,
        tau_up: float = 1.0,
        h_warm: float | None = None,
    ) -> Gate:
        """The condition's gate. `grpo` has no term: its lambda is always 0."""
        c = resolve_condition(cond)
        return cls(lambda_max if c.sign else 0.0, warmup_steps, tau_down, tau_up, h_warm, c.gated)

    def recalibrate(self) -> None:
        """Back to the state of a new gate: as many warm-up steps again ("continual AntiSD", section 4.4)."""
        self.history: list[float] = []
        self.h_warm: float | None = self.given
        self._g = 1
        self._warming_up = self.warmup_steps > 0

    def rescale(self, factor: float) -> None:
        """Multiply what was measured so far by `factor` (above 0): the entropies are those of another number format
        from here on, in which the same tokens have a median `factor` times as large. g stays, and so does an H_warm
        that the recipe gives."""
        self.history = [h * factor for h in self.history]
        if self.given is None and self.h_warm is not None:
            self.h_warm *= factor

    @property
    def warming_up(self) -> bool:
        """The latest step was a warm-up step (before any step: the first one will be)."""
        return self._warming_up

    @property
    def is_open(self) -> bool:
        """The term acted in the latest step: g = 1, not a warm-up step, lambda_max not 0."""
        return not self._warming_up and self._g == 1 and self.lambda_max != 0

    @property
    def thresholds(self) -> tuple[float, float] | None:
        """(closes below, reopens from) in nats; None for an ungated condition or before H_warm is known."""
        if not self.gated or self.h_warm is None:
            return None
        return self.tau_down * self.h_warm, self.tau_up * self.h_warm

    def update(self, median_entropy: float | None) -> float:
        """This step's lambda, from this step's H (None or NaN: no token counts).

        Raises GateError for an H that is no entropy (infinite, or clearly negative).
        """
        h = None if median_entropy is None or math.isnan(median_entropy) else float(median_entropy)
        if h is not None and not (math.isfinite(h) and h > -1e-3):
            raise GateError(f"the median entropy is {h}, not a finite number from 0 up: look for non-finite log-probs")
        if self._warming_up and len(self.history) >= self.warmup_steps:
            self._calibrate()
            self._warming_up = False
        if self._warming_up:
            if h is not None:
                self.history.append(h)
            if len(self.history) >= self.warmup_steps:
                self._calibrate()
            return 0.0
        levels = self.thresholds
        if h is not None and levels is not None:
            down, up = levels
            if self._g == 0 and h >= up:
                self._g = 1
            elif self._g == 1 and h < down:
                self._g = 0
        return self._g * self.lambda_max

    def _calibrate(self) -> None:
        if self.h_warm is None and self.history:
            self.h_warm = sorted(self.history)[(len(self.history) - 1) // 2]

    def state_dict(self) -> dict[str, Any]:
        """The gate's state as plain JSON values."""
        return {
            "g": self._g,
            "h_warm": self.h_warm,
            "history": list(self.history),
            "warming_up": self._warming_up,
            "gated": self.gated,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved state.

        A gated condition recalibrates instead when the state is that of an ungated one (`grpo`, `sd`, `no_gate`), and
        so does any condition with a warm-up when the state has no step of one. An ungated one restores the progress of
        its warm-up only. H_warm is what the recipe gives, otherwise the saved warm-up's median: one that the saved
        recipe gave does not outlive it.
        """
        self.recalibrate()
        if (self.gated and not state["gated"]) or (self.warmup_steps > 0 and not state["history"]):
            return
        self.history = [float(h) for h in state["history"]]
        self._warming_up = bool(state["warming_up"])
        self._g = int(state["g"]) if self.gated else 1
        if not self._warming_up or len(self.history) >= self.warmup_steps:
            self._calibrate()

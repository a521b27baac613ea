"""Outliers of u: a u above a multiple of its standard deviation, measured in a warm-up, counts as 0 in the term."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def without_outliers(u: Tensor, limit: float | None) -> Tensor:
    """u [N] with 0 where |u| is above `limit` (nats); None: u itself. The term of u = 0 is 0."""
    return u if limit is None else torch.where(u.abs() > limit, torch.zeros_like(u), u)


class OutlierLimit:
    """The limit `deviations` * sigma, with sigma the mean over the first `warmup_steps` steps of u's standard deviation
    over the tokens of the global batch.

    There is no limit before that. A step without u (None) does not count. A checkpoint needs `state_dict` alone.
    """

    def __init__(self, deviations: float, warmup_steps: int) -> None:
        if deviations <= 0 or warmup_steps < 1:
            raise ValueError(f"deviations {deviations} must be above 0 and warmup_steps {warmup_steps} at least 1")
        self.deviations, self.warmup_steps = deviations, warmup_steps
        self.history: list[float] = []
        self.given: float | None = None  # a recipe gives deviations, no limit

    @property
    def measuring(self) -> bool:
        """Whether sigma is not known yet."""
        return len(self.history) < self.warmup_steps

    @property
    def limit(self) -> float | None:
        """In nats; None while sigma is being measured."""
        return None if self.measuring else self.deviations * sum(self.history) / len(self.history)

    def record(self, deviation: float | None) -> None:
        """The standard deviation of a step's u, which counts while sigma is being measured."""
        if deviation is not None and self.measuring:
            self.history.append(deviation)

    def rescale(self, factor: float) -> None:
        """Multiply the measured deviations by `factor` (above 0): that of u in another number format."""
        self.history = [deviation * factor for deviation in self.history]

    def recalibrate(self) -> None:
        """Measure again, from the next step on."""
        self.history = []

    def state_dict(self) -> dict[str, Any]:
        """The state as plain JSON values."""
        return {"history": list(self.history)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.history = [float(deviation) for deviation in state["history"]]

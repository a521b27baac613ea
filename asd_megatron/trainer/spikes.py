"""The rule for spikes of the gradient norm: an update whose norm is far above those before it is skipped, or its
gradient scaled down."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

SpikeAction = Literal["clip", "skip"]
WINDOW = 100
"""Updates whose norms the limit is computed of."""
FEWEST = 20
"""Norms below which there is no limit yet."""
QUANTILE = 0.9


def spike_limit(norms: Iterable[float], factor: float) -> float | None:
    """`factor` times the 90% quantile of `norms`, none of which is a spike itself; None for fewer than 20.

    The quantile is an element of the list: with 20 norms the 18th by size, so two spikes among them do not move it.
    """
    ordered = sorted(norms)
    if len(ordered) < FEWEST:
        return None
    return factor * ordered[int(QUANTILE * (len(ordered) - 1))]


class Spike(NamedTuple):
    """A gradient norm, and the limit that it was above."""

    norm: float
    limit: float


class SpikeRule:
    """Keeps the newest gradient norms and says what is a spike. The same on every rank, which all see the same norms.

    action: `skip`: the update is not applied; `clip`: the gradient is scaled to the limit. factor: of `spike_limit`.

    Every finite norm above 0 enters the window, a spike's too: norms that have moved to a new level are no spikes any
    more after a tenth of the window. A norm of 0 (a batch without a signal) says nothing about those that have one.
    """

    def __init__(self, action: SpikeAction, factor: float) -> None:
        self.action, self.factor = action, factor
        self._norms: deque[float] = deque(maxlen=WINDOW)
        self._found: list[Spike] = []

    @property
    def limit(self) -> float | None:
        """What the next update's norm is compared with."""
        return spike_limit(self._norms, self.factor)

    def exceeds(self, norm: float) -> float | None:
        """The limit, if the finite `norm` of this update is above it; else None. Counts the norm."""
        limit = self.limit
        if norm > 0:
            self._norms.append(norm)
        if limit is None or norm <= limit:
            return None
        self._found.append(Spike(norm, limit))
        return limit

    def take(self) -> list[Spike]:
        """The spikes since the last call."""
        found, self._found = self._found, []
        return found

    def state_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {"norms": list(self._norms)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._norms = deque((float(norm) for norm in state["norms"]), maxlen=WINDOW)

"""A run's metrics as curves over its steps, alone or beside another run's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from asd_megatron.observe.names import graded


@dataclass(frozen=True)
class Curve:
    """One metric over the steps at which it is a number."""

    steps: np.ndarray
    values: np.ndarray

    def __bool__(self) -> bool:
        return len(self.steps) > 0


class Curves:
    """The metrics of the run `name`; `beside`: another run's, to compare with."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], name: str = "", beside: Curves | None = None) -> None:
        self.rows, self.name, self.beside = rows, name, beside
        self.names = {name for row in rows for name, value in row.items() if isinstance(value, int | float)}
        self.last: int = max((row["step"] for row in rows), default=0)
        # without a pass rate nothing tells rewards of 0 and 1 from others
        unknown = "reward/mean" in self.names and "reward/pass_rate" not in self.names
        self.graded: bool = graded(rows) or unknown or beside is not None and beside.graded
        if beside is not None:
            self.last = max(self.last, beside.last)

    def label(self, what: str = "") -> str | None:
        """The legend's name of a curve: what it shows, and of two runs which one's it is."""
        return ", ".join(filter(None, (self.name if self.beside is not None else "", what))) or None

    def __getitem__(self, name: str) -> Curve:
        points = [(row["step"], row[name]) for row in self.rows if isinstance(row.get(name), int | float)]
        array = np.asarray(points, dtype=np.float64).reshape(-1, 2)
        return Curve(array[:, 0], array[:, 1])

    def __contains__(self, name: str) -> bool:
        return name in self.names


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Centred running mean of odd width; at the ends the window keeps what lies inside the curve."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    first, last = np.maximum(at - width // 2, 0), np.minimum(at + width // 2 + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)

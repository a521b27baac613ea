"""High-water marks of the memory that PyTorch has allocated on this rank's GPU, of a step and of its phases."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

GIB = 2.0**30


class PeakMemory:
    """Peaks of one step after another. `cuda`: torch.cuda, None on a machine without: nothing is measured then.

    PyTorch has one peak, which is reset at the beginning and the end of each phase; the step's is the largest.
    """

    def __init__(self, cuda: Any = None) -> None:
        self._cuda = cuda
        self._peak = self._reserved = 0
        self._phases: dict[str, int] = {}

    @classmethod
    def of_this_machine(cls) -> PeakMemory:
        return cls(torch.cuda if torch.cuda.is_available() else None)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Attribute the peak inside to the phase `name`. Phases do not overlap."""
        if self._cuda is None:
            yield
            return
        self._reset()
        try:
            yield
        finally:
            self._phases[name] = max(self._phases.get(name, 0), self._reset())

    def take(self) -> dict[str, float]:
        """Metrics `memory/*` of the step, in GiB; starts the next step. {} without CUDA."""
        if self._cuda is None:
            return {}
        self._reset()
        found = {"memory/peak_gib": self._peak / GIB, "memory/reserved_gib": self._reserved / GIB}
        found |= {f"memory/peak_gib_{name}": peak / GIB for name, peak in self._phases.items()}
        self._peak = self._reserved = 0
        self._phases = {}
        return found

    def _reset(self) -> int:
        """The peak in bytes since the last call, which begins again at what is allocated now."""
        peak = int(self._cuda.max_memory_allocated())
        self._peak = max(self._peak, peak)
        self._reserved = max(self._reserved, int(self._cuda.max_memory_reserved()))
        self._cuda.reset_peak_memory_stats()
        return peak

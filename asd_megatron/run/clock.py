"""Wall-clock time of the phases of a step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Seconds of each phase of the current step."""

    def __init__(self) -> None:
        self.times: dict[str, float] = {}
        self._started = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the seconds spent inside to the phase `name`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.times[name] = self.times.get(name, 0.0) + time.perf_counter() - started

    def take(self) -> dict[str, float]:
        """The step's phases and its `total`; starts the next step."""
        now = time.perf_counter()
        times, self.times = {**self.times, "total": now - self._started}, {}
        self._started = now
        return times

"""Wall-clock time of the phases of a step, and their peaks of GPU memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from asd_megatron.distributed import activity
from asd_megatron.distributed.activity import Phase
from asd_megatron.observe.memory import PeakMemory

WATCHED: dict[str, Phase] = {
    "rollout": "rollout",
    "teacher": "scoring",
    "student": "scoring",
    "reference": "scoring",
    "probe": "scoring",
    "update": "update",
    "checkpoint": "checkpoint",
    "evaluate": "evaluation",
}
"""Spans of a step that begin a phase of the watch over the ranks (`run.timeout`), which lasts until the next begins."""


class Clock:
    """Seconds of each phase of the current step. `peaks`: metrics `memory/*` of the step before, {} without CUDA."""

    def __init__(self) -> None:
        self.times: dict[str, float] = {}
        self.memory = PeakMemory.of_this_machine()
        self.peaks: dict[str, float] = {}
        self._started = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the seconds spent inside to the phase `name`, and measure it as `span` does."""
        with self.seconds(name), self.span(name):
            yield

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Measure the peak of memory inside; a trace of the profiler has the name. Spans do not overlap."""
        if name in WATCHED:
            activity.enter(WATCHED[name])
        with self.memory.phase(name), torch.profiler.record_function(name):
            yield

    @contextmanager
    def seconds(self, name: str) -> Iterator[None]:
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
        self.peaks = self.memory.take()
        return times

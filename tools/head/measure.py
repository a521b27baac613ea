"""Time of one call, on a machine that others may be using."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from machine_load import others, wait_until_quiet

QUIET = 0.05
"""Share of the cores that others may use while something is timed."""


class Clock(NamedTuple):
    """What counts as time: the wall's, while others are quiet, for at most `patience` seconds a time; or the processor
    time of this process, which others hardly change, of one thread."""

    patience: float = 0.0
    processor: bool = False


class Sample(NamedTuple):
    seconds: float
    others: float  # the share of the cores' time that went to other processes meanwhile


def sample(action: Callable[[], object], device: torch.device, clock: Clock) -> Sample:
    """Time of one call. While others disturb it, it is timed again; the time with the least disturbance counts, whether
    it is short or long."""
    deadline = time.monotonic() + clock.patience
    best = _sample(action, device, clock.processor)
    while best.others > QUIET and time.monotonic() < deadline:
        wait_until_quiet(QUIET, deadline)
        best = min(best, _sample(action, device, clock.processor), key=lambda found: found.others)
    return best


def _sample(action: Callable[[], object], device: torch.device, processor: bool) -> Sample:
    gc.collect()
    _synchronize(device)
    read = time.process_time if processor else time.perf_counter
    with others() as share:
        start = read()
        result = action()
        _synchronize(device)
        elapsed = read() - start
    del result
    return Sample(elapsed, share[0])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

"""Time and memory of one call, on a machine that others may be using."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

CPU_INFO, STATISTICS, CLEAR, STATUS = (
    Path(p) for p in ("/proc/cpuinfo", "/proc/stat", "/proc/self/clear_refs", "/proc/self/status")
)
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
        while _busy() > QUIET and time.monotonic() < deadline:
            time.sleep(1.0)
        best = min(best, _sample(action, device, clock.processor), key=lambda found: found.others)
    return best


def _sample(action: Callable[[], object], device: torch.device, processor: bool) -> Sample:
    gc.collect()
    _synchronize(device)
    idle, total = _jiffies()
    own = _own_seconds()
    read = time.process_time if processor else time.perf_counter
    start = read()
    result = action()
    _synchronize(device)
    elapsed = read() - start
    own = (_own_seconds() - own) * os.sysconf("SC_CLK_TCK")
    idle, total = (now - then for now, then in zip(_jiffies(), (idle, total), strict=True))
    del result
    return Sample(elapsed, max(0.0, (total - idle - own) / total) if total else 0.0)


def _own_seconds() -> float:
    """Processor time of this process and of its children that have ended."""
    return sum(os.times()[:4])


def _busy(window: float = 0.5) -> float:
    """Share of the cores in use while this process sleeps."""
    idle, total = _jiffies()
    time.sleep(window)
    idle, total = (now - then for now, then in zip(_jiffies(), (idle, total), strict=True))
    return 1.0 - idle / total if total else 0.0


def _jiffies() -> tuple[int, int]:
    """(idle, all) time of the cores so far; zeros where the system does not tell."""
    if not STATISTICS.exists():
        return 0, 0
    fields = [int(field) for field in STATISTICS.read_text().splitlines()[0].split()[1:9]]
    return fields[3] + fields[4], sum(fields)  # waiting for a disk is idle


def peak_bytes(action: Callable[[], object], device: torch.device) -> int:
    """The most that `action` has allocated at once for tensors, its result included.

    From torch's allocators, so that temporaries inside operations count; what BLAS libraries allocate for themselves
    does not (see `peak_resident`).
    """
    gc.collect()
    if device.type == "cuda":
        _synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = action()
        _synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
        del result
        return peak
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = action()
    del result
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def peak_resident(action: Callable[[], object]) -> int | None:
    """Growth of this process's resident memory during `action` (bytes), BLAS's own buffers included. For a process
    that has done little else: memory freed before would be used again unseen. None where the kernel does not tell."""
    gc.collect()
    try:
        CLEAR.write_text("5")  # the high-water mark starts anew
    except OSError:
        return None
    before = _status("VmRSS")
    result = action()
    grown = _status("VmHWM") - before
    del result
    return grown


def _status(key: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on."""
    names = [line.split(":")[1].strip() for line in CPU_INFO.read_text().splitlines() if line.startswith("model name")]
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": names[0] if names else "unknown",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load": os.getloadavg(),
    }

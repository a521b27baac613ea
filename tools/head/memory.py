"""Memory of one call."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import torch

CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def peak_bytes(action: Callable[[], object], device: torch.device) -> int:
    """The most that `action` has allocated at once for tensors, its result included.

    From torch's allocators, so that temporaries inside operations count; what BLAS libraries allocate for themselves
    does not (see `peak_resident`).
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = action()
        torch.cuda.synchronize(device)
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

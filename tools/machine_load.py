"""The machine that figures come from, and how much of it others used meanwhile."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

STATISTICS, PROCESSOR = Path("/proc/stat"), Path("/proc/cpuinfo")


def machine(threads: int) -> dict[str, Any]:
    """What figures depend on; `threads` of each process."""
    lines = PROCESSOR.read_text().splitlines() if PROCESSOR.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cpu": names[0] if names else "unknown CPU",
        "cores": os.cpu_count(),
        "threads": threads,
        "torch": torch.__version__,
        "load": os.getloadavg(),
    }


@contextmanager
def others() -> Iterator[list[float]]:
    """Share of the cores that is used by others than this process and the children that end inside; one number, there
    on leaving (0 where the system does not tell)."""
    found: list[float] = []
    busy, total = _jiffies()
    own = _own()
    yield found
    busy_after, total_after = _jiffies()
    ticks = os.sysconf("SC_CLK_TCK")
    share = (busy_after - busy - (_own() - own) * ticks) / (total_after - total) if total_after > total else 0.0
    found.append(min(max(share, 0.0), 1.0))


def wait_until_quiet(quiet: float, deadline: float) -> None:
    """Wait until others use less than `quiet` of the cores, at most until `deadline` (of `time.monotonic`)."""
    while time.monotonic() < deadline:
        with others() as share:
            time.sleep(1.0)
        if share[0] < quiet:
            return


def _own() -> float:
    """Seconds of processor time."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _jiffies() -> tuple[int, int]:
    """(busy, all) of all cores since the start; time taken by the machine's host counts as busy."""
    if not STATISTICS.exists():
        return 0, 0
    fields = [int(part) for part in STATISTICS.read_text().splitlines()[0].split()[1:9]]
    return sum(fields) - fields[3] - fields[4], sum(fields)

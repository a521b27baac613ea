"""Processor time of a process with all processes below it (Linux)."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def processor_seconds(root: int) -> float:
    """User and system seconds so far of the process `root` and of those of its descendants that still run."""
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            fields = stat.read_text().rpartition(")")[2].split()  # after the name: state, parent, ...
            pid = int(stat.parent.name)
            parents[pid], ticks[pid] = int(fields[1]), int(fields[11]) + int(fields[12])

    def below(pid: int) -> bool:
        while pid in parents and pid != root:
            pid = parents[pid]
        return pid == root

    return sum(used for pid, used in ticks.items() if below(pid)) / os.sysconf("SC_CLK_TCK")

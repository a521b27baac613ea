"""What processes use of the machine, from /proc: nothing is known where there is none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass
class Usage:
    """Of all processes of a session: resident bytes (memory that several of them share counts for each) and tasks
    (processes and their threads)."""

    resident_bytes: int = 0
    tasks: int = 0
    processes: list[str] = field(default_factory=list)

    def proportional_bytes(self) -> int:
        """The same with shared memory counted once; costs milliseconds for each process."""
        return sum(map(_proportional_bytes, self.processes)) or self.resident_bytes


def usage_of_sessions() -> dict[int, Usage]:
    """What each session uses, by the process that began it. Costs about 20 microseconds for each process of the
    machine."""
    found: dict[int, Usage] = {}
    for name in os.listdir(PROC) if PROC.is_dir() else ():
        if name.isdigit():
            with suppress(OSError, ValueError, IndexError):  # it has just ended
                fields = (PROC / name / "stat").read_bytes().rpartition(b")")[2].split()
                usage = found.setdefault(int(fields[3]), Usage())
                usage.tasks += int(fields[17])
                usage.resident_bytes += int(fields[21]) * PAGE
                usage.processes.append(name)
    return found


def _proportional_bytes(process: str) -> int:
    with suppress(OSError, ValueError, IndexError):
        for line in (PROC / process / "smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) << 10
    return 0


def memory_bytes() -> int:
    """The memory that this process may use: the machine's, or less by its control group (a container, a Slurm job)."""
    return min([PAGE * os.sysconf("SC_PHYS_PAGES"), *_limits_of_groups()])


def _limits_of_groups() -> Iterator[int]:
    with suppress(OSError):
        for line in (PROC / "self" / "cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers not in ("", "memory"):
                continue
            top, file = (CGROUPS, "memory.max") if not controllers else (CGROUPS / "memory", "memory.limit_in_bytes")
            group = top / path.lstrip("/")
            for folder in (group, *group.parents):
                if folder.is_relative_to(top):
                    with suppress(OSError, ValueError):  # `max`: no limit
                        yield int((folder / file).read_text())

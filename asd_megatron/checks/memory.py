"""The most memory that this process used."""

from __future__ import annotations

import ctypes
import gc
import re
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"


class PeakMemory:
    """Inside, counts the most memory beside what the process had before; afterwards `mib` has it. On CUDA torch's own
    count, elsewhere resident memory; None where the system does not tell (other than Linux)."""

    mib: float | None = None

    def __enter__(self) -> PeakMemory:
        gc.collect()
        self._before = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        elif STATUS.exists():
            self._give_back()
            CLEAR.write_text(RESET_PEAK)
            self._before = _resident("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _resident("VmHWM")
            self.mib = (peak - self._before) / 2**20

    @staticmethod
    def _give_back() -> None:
        """Return freed memory to the system, or it would be used again unseen."""
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)


def _resident(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", STATUS.read_text())
    return int(found[1]) * 1024 if found else 0

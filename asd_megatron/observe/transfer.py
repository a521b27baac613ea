"""Progress of loading or exporting a large model, in lines."""

from __future__ import annotations

import time
from collections.abc import Callable

from asd_megatron.observe.progress import clock_text

QUIET_BYTES = 1 << 30


class TransferProgress:
    """`loading the model: 3.2 of 16.4 GB (1.10 GB/s)` through `say` every `every_seconds`, at the end what it took.
    Nothing below QUIET_BYTES or for what is quicker than that. Called with (bytes done, all bytes)."""

    def __init__(
        self,
        what: str,
        say: Callable[[str], None],
        *,
        every_seconds: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._what, self._say, self._every, self._clock = what, say, every_seconds, clock
        self._started = self._last = clock()
        self._shown = False

    def __call__(self, done: int, total: int) -> None:
        now, complete = self._clock(), done >= total
        if total < QUIET_BYTES or (now - self._last < self._every and not (complete and self._shown)):
            return
        self._last, self._shown = now, True
        seconds = max(now - self._started, 1e-9)
        amount = (
            f"{total / 1e9:.1f} GB in {clock_text(seconds)}"
            if complete
            else f"{done / 1e9:.1f} of {total / 1e9:.1f} GB"
        )
        self._say(f"{self._what}: {amount} ({done / 1e9 / seconds:.2f} GB/s)")

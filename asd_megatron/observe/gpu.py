"""Telemetry of this rank's GPU: a thread that samples it, and what it saw in one step."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import torch

from asd_megatron.observe.nvml import NvmlDevice, NvmlUnavailable, open_device

log = logging.getLogger("asd_megatron")

LONGEST_WAIT = 1.0
"""Seconds that a step, or the end of the run, waits at most for a reading in progress."""


class GpuTelemetry:
    """Samples one GPU every `seconds` on a daemon thread until `close`, or until no reading is left.

    `take` gives the means of the gauges over the samples since the last call, and of the counters what they grew by:
    `gpu/energy_kj` exactly, `gpu/nvlink_gbps` over the time.
    """

    def __init__(self, device: NvmlDevice, *, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._device, self._seconds, self._clock = device, seconds, clock
        self._lock = threading.Lock()  # of the device and of what follows
        self._sums: dict[str, tuple[float, int]] = {}
        self._last: dict[str, tuple[float, float]] = {}  # of each counter: time, count
        self._told: set[str] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gpu telemetry", daemon=True)

    def start(self) -> None:
        with self._lock:
            self._grown()
        self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def take(self) -> dict[str, float]:
        """Metrics `gpu/*` of the step that ends here; without those that cannot be read. {} if a reading hangs."""
        if not self._lock.acquire(timeout=LONGEST_WAIT):
            return {}
        try:
            if not self._sums:  # a step shorter than the interval
                self._sample()
            sums, self._sums = self._sums, {}
            return {name: total / count for name, (total, count) in sums.items()} | self._grown()
        finally:
            self._lock.release()

    def close(self) -> None:
        """End the thread. One that hangs in the driver is left: it is a daemon."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(LONGEST_WAIT)
        if not self._thread.is_alive():
            self._device.close()

    def _run(self) -> None:
        while not self._stop.wait(self._seconds):
            with self._lock:
                self._sample()
                if not self._device.has_gauges:
                    log.warning("telemetry of the GPU ends: no reading works any more (%s)", self._device.last_error)
                    return

    def _sample(self) -> None:
        for name, value in self._device.gauges().items():
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = (total + value, count + 1)
        new = self._device.throttle_reasons - self._told
        if new:
            self._told |= new
            log.warning("the GPU's clocks are held down: %s (gpu/throttled has the fraction)", ", ".join(sorted(new)))

    def _grown(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, count in self._device.counters().items():
            now = self._clock()
            if name in self._last:
                then, before = self._last[name]
                grown = max(count - before, 0.0)  # a driver that was loaded again begins at 0
                found[name] = grown if name == "gpu/energy_kj" else grown / max(now - then, 1e-9)
            self._last[name] = (now, count)
        return found


def open_gpu(*, seconds: float) -> GpuTelemetry:
    """Telemetry of torch's present device, started. Raises NvmlUnavailable."""
    identity = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", None)
    if identity is None:
        raise NvmlUnavailable("this release of torch does not report the GPU's UUID")
    telemetry = GpuTelemetry(open_device(identity), seconds=seconds)
    telemetry.start()
    return telemetry

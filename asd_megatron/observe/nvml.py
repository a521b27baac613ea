"""What NVML, the driver's management library, says about one GPU. Through the package nvidia-ml-py (`pynvml`), which is
optional; a function that the GPU, the driver or the package does not have costs its metric alone."""

from __future__ import annotations

import importlib
import logging
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

log = logging.getLogger("asd_megatron")

MAX_FAILURES = 10
"""A reading that fails so often in succession is given up."""
MAX_LINKS = 18
"""NVLinks of a GPU of Hopper's and Blackwell's generation; older ones have fewer."""
THROTTLING = {
    "software power cap": "SwPowerCap",
    "hardware slowdown": "HwSlowdown",
    "software thermal slowdown": "SwThermalSlowdown",
    "hardware thermal slowdown": "HwThermalSlowdown",
    "power brake": "HwPowerBrakeSlowdown",
}
"""Reasons for which clocks are below what they could be, in words, and NVML's names of their bits."""
GPM_METRICS = {
    "gpu/sm_active": "NVML_GPM_METRIC_SM_UTIL",
    "gpu/tensor_active": "NVML_GPM_METRIC_ANY_TENSOR_UTIL",
    "gpu/dram_active": "NVML_GPM_METRIC_DRAM_BW_UTIL",
}
"""Hopper's and later GPUs' own counters, in percent."""
_VALUE_FIELDS = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")  # by NVML_VALUE_TYPE
_UNSUPPORTED = (
    "NVML_ERROR_NOT_SUPPORTED",
    "NVML_ERROR_FUNCTION_NOT_FOUND",
    "NVML_ERROR_NO_PERMISSION",
    "NVML_ERROR_INVALID_ARGUMENT",
    "NVML_ERROR_ARGUMENT_VERSION_MISMATCH",
    "NVML_ERROR_NOT_FOUND",
)


class NvmlUnavailable(Exception):
    """Why there is no telemetry of this GPU."""


class _Missing(Exception):
    """A reading that this GPU, its driver or the package does not have."""


@dataclass
class _Reader:
    """One function of NVML and the names of what it reads."""

    names: str
    read: Callable[[], Mapping[str, float]]
    failures: int = 0


def uuid_forms(given: Any) -> list[str]:
    """The forms in which NVML may know a device by the UUID that torch gives: text with or without the prefix of a GPU
    or of a part of one (MIG), the same as bytes, or its 16 bytes."""
    if isinstance(given, bytes | bytearray):
        text = str(uuid.UUID(bytes=bytes(given))) if len(given) == 16 else bytes(given).decode("ascii").strip("\0")
    else:
        text = str(given)
    return [text] if text.startswith(("GPU-", "MIG-")) else [f"GPU-{text}", f"MIG-{text}"]


def open_device(device_uuid: Any) -> NvmlDevice:
    """The GPU with the UUID of torch's device properties. Raises NvmlUnavailable."""
    try:
        nvml = importlib.import_module("pynvml")
    except Exception as error:
        raise NvmlUnavailable("nvidia-ml-py is not installed (install the extra `asd_megatron[telemetry]`)") from error
    try:
        nvml.nvmlInit()
    except Exception as error:
        raise NvmlUnavailable(f"NVML cannot be used ({error})") from error
    for form in uuid_forms(device_uuid):
        with suppress(nvml.NVMLError):
            return NvmlDevice(nvml, nvml.nvmlDeviceGetHandleByUUID(form))
    with suppress(nvml.NVMLError):
        nvml.nvmlShutdown()
    raise NvmlUnavailable(f"NVML does not know this rank's GPU, {' or '.join(uuid_forms(device_uuid))}")


class NvmlDevice:
    """Guarded readings of one GPU. Not thread-safe.

    A reading that does not exist here is given up at once, one that fails `MAX_FAILURES` times in succession then; the
    log names it. `throttle_reasons` are those seen so far, in words; `last_error` is that of the reading given up last.
    """

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle
        self.throttle_reasons: set[str] = set()
        self.last_error = ""
        self._unsupported = {getattr(nvml, name) for name in _UNSUPPORTED if hasattr(nvml, name)}
        self._gauges = [
            _Reader("gpu/utilization", self._utilization),
            _Reader("gpu/memory_used_gib", self._memory),
            _Reader("gpu/power_w", self._power),
            _Reader("gpu/temperature_c", self._temperature),
            _Reader("gpu/sm_clock_mhz", self._clock),
            _Reader("gpu/throttled", self._throttled),
            _Reader("gpu/ecc_uncorrected", self._ecc),
            _Reader(", ".join(GPM_METRICS), _Gpm(nvml, handle).read),
        ]
        self._counters = [_Reader("gpu/energy_kj", self._energy), _Reader("gpu/nvlink_gbps", self._nvlink)]

    @property
    def has_gauges(self) -> bool:
        """Whether any gauge can still be read."""
        return bool(self._gauges)

    def gauges(self) -> dict[str, float]:
        """Values of now, or since the last call, by metric name."""
        return self._read(self._gauges)

    def counters(self) -> dict[str, float]:
        """Counts since the driver was loaded: `gpu/energy_kj` in kJ, `gpu/nvlink_gbps` in GB, both directions of all
        links."""
        return self._read(self._counters)

    def close(self) -> None:
        with suppress(Exception):
            self._nvml.nvmlShutdown()

    def _read(self, readers: list[_Reader]) -> dict[str, float]:
        found: dict[str, float] = {}
        dropped = []
        for reader in list(readers):
            try:
                found |= reader.read()
                reader.failures = 0
            except Exception as error:  # of NVML, of ctypes, of a package of another version
                reader.failures += 1
                if self._is_missing(error) or reader.failures >= MAX_FAILURES:
                    readers.remove(reader)
                    self.last_error = str(error)
                    dropped.append(f"{reader.names} ({error})")
        if dropped and readers:
            log.info("telemetry: this GPU does not report %s", "; ".join(dropped))
        return found

    def _is_missing(self, error: Exception) -> bool:
        return isinstance(error, AttributeError | _Missing) or getattr(error, "value", None) in self._unsupported

    # ---------------------------------------------------------------- single readings

    def _utilization(self) -> dict[str, float]:
        return {"gpu/utilization": self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu / 100}

    def _memory(self) -> dict[str, float]:
        return {"gpu/memory_used_gib": self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used / 2**30}

    def _power(self) -> dict[str, float]:
        return {"gpu/power_w": self._nvml.nvmlDeviceGetPowerUsage(self._handle) / 1e3}

    def _temperature(self) -> dict[str, float]:
        sensor = self._nvml.NVML_TEMPERATURE_GPU
        try:
            celsius = self._nvml.nvmlDeviceGetTemperatureV(self._handle, sensor)
        except Exception as error:  # a driver or package before this form
            if not self._is_missing(error):
                raise
            celsius = self._nvml.nvmlDeviceGetTemperature(self._handle, sensor)
        return {"gpu/temperature_c": float(celsius)}

    def _clock(self) -> dict[str, float]:
        return {"gpu/sm_clock_mhz": float(self._nvml.nvmlDeviceGetClockInfo(self._handle, self._nvml.NVML_CLOCK_SM))}

    def _throttled(self) -> dict[str, float]:
        try:
            bits = self._nvml.nvmlDeviceGetCurrentClocksEventReasons(self._handle)
        except Exception as error:  # a driver or package before it got this name
            if not self._is_missing(error):
                raise
            bits = self._nvml.nvmlDeviceGetCurrentClocksThrottleReasons(self._handle)
        reasons = {words for words, name in THROTTLING.items() if bits & self._bit(name)}
        self.throttle_reasons |= reasons
        return {"gpu/throttled": float(bool(reasons))}

    def _bit(self, name: str) -> int:
        old = getattr(self._nvml, f"nvmlClocksThrottleReason{name}", 0)
        return int(getattr(self._nvml, f"nvmlClocksEventReason{name}", old))

    def _ecc(self) -> dict[str, float]:
        n = self._nvml
        kind, since = n.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, n.NVML_VOLATILE_ECC
        return {"gpu/ecc_uncorrected": float(n.nvmlDeviceGetTotalEccErrors(self._handle, kind, since))}

    def _energy(self) -> dict[str, float]:
        return {"gpu/energy_kj": self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1e6}

    def _nvlink(self) -> dict[str, float]:
        n = self._nvml
        ids = (n.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX, n.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX)
        asked = [(field, link) for link in range(MAX_LINKS) for field in ids]
        values = list(n.nvmlDeviceGetFieldValues(self._handle, asked))
        answered = [v for v in values if v.nvmlReturn == n.NVML_SUCCESS]
        if not answered:
            if all(v.nvmlReturn in self._unsupported for v in values):
                raise _Missing("no NVLink")
            raise RuntimeError("no link answers")
        kib = sum(getattr(v.value, _VALUE_FIELDS[v.valueType]) for v in answered)
        return {"gpu/nvlink_gbps": kib * 1024 / 1e9}


class _Gpm:
    """The GPU's own counters between two reads, of Hopper and later GPUs."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle
        self._sample: Callable[[Any], Any] | None = None  # fills a buffer
        self._buffers: list[Any] = []  # the newer last

    def read(self) -> dict[str, float]:
        """{} at the first call."""
        n = self._nvml
        if self._sample is None:
            self._sample = self._sampling()
            self._buffers = [n.nvmlGpmSampleAlloc(), n.nvmlGpmSampleAlloc()]
            self._sample(self._buffers[1])
            return {}
        self._buffers.reverse()
        self._sample(self._buffers[1])
        request = n.c_nvmlGpmMetricsGet_t()
        request.version, request.numMetrics = n.NVML_GPM_METRICS_GET_VERSION, len(GPM_METRICS)
        request.sample1, request.sample2 = self._buffers
        for i, name in enumerate(GPM_METRICS.values()):
            request.metrics[i].metricId = getattr(n, name)
        n.nvmlGpmMetricsGet(request)
        return dict(self._valid(request.metrics))

    def _valid(self, metrics: Any) -> Iterator[tuple[str, float]]:
        for name, metric in zip(GPM_METRICS, metrics, strict=False):
            if metric.nvmlReturn == self._nvml.NVML_SUCCESS:
                yield name, metric.value / 100

    def _sampling(self) -> Callable[[Any], Any]:
        n, gpu = self._nvml, self._handle
        part = None
        if int(getattr(n.nvmlDeviceIsMigDeviceHandle(gpu), "value", 0)):
            part, gpu = n.nvmlDeviceGetGpuInstanceId(gpu), n.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(gpu)
        if not n.nvmlGpmQueryDeviceSupport(gpu).isSupportedDevice:
            raise _Missing("the GPU has no such counters")
        if part is None:
            return lambda buffer: n.nvmlGpmSampleGet(gpu, buffer)
        return lambda buffer: n.nvmlGpmMigSampleGet(gpu, part, buffer)

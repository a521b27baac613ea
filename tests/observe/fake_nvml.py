"""A module `pynvml` of one imaginary GPU, with the names and signatures of nvidia-ml-py. Its counters grow with each
call."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

UUID = "12345678-9abc-def0-1234-56789abcdef0"
HANDLE, MIG_HANDLE = "gpu", "part of the gpu"
NOT_SUPPORTED, UNKNOWN, FUNCTION_NOT_FOUND = 3, 999, 13
LINKS = 4


class NVMLError(Exception):
    def __init__(self, value: int) -> None:
        super().__init__({NOT_SUPPORTED: "Not Supported", UNKNOWN: "Unknown Error"}.get(value, f"error {value}"))
        self.value = value


def fake_pynvml(**changed: Any) -> Any:
    """`changed` replaces members: a function, a number, None for one that the package lacks, an NVMLError that a
    function raises. `calls` of the result counts the calls of each function, `known` are the UUIDs."""
    module: Any = ModuleType("pynvml")
    module.calls, module.known = {}, {f"GPU-{UUID}": HANDLE}
    module.ticks = {"energy": 5_000_000, "nvlink": 1_000_000}
    module.failing = None  # an NVMLError that every reading raises
    module.gpm_samples = 0

    def by_uuid(uuid: str | bytes) -> str:
        text = uuid.decode() if isinstance(uuid, bytes) else uuid
        if text not in module.known:
            raise NVMLError(6)
        return str(module.known[text])

    def energy(handle: Any) -> int:
        module.ticks["energy"] += 250_000  # 250 J in mJ
        return int(module.ticks["energy"])

    def field_values(handle: Any, fields: list[tuple[int, int]]) -> list[Any]:
        module.ticks["nvlink"] += 1000  # KiB of one link in one direction

        def value(link: int) -> Any:
            known = link < LINKS
            held = SimpleNamespace(ullVal=module.ticks["nvlink"], uiVal=7)
            return SimpleNamespace(nvmlReturn=0 if known else NOT_SUPPORTED, valueType=3, value=held)

        return [value(link) for _, link in fields]

    def gpm_get(handle: Any, sample: Any) -> Any:
        module.gpm_samples += 1
        sample.number = module.gpm_samples
        return sample

    def gpm_metrics(request: Any) -> Any:
        assert request.version == 1 and request.sample2.number == request.sample1.number + 1
        shown = {2: 80.0, 5: 45.0, 10: 60.0}
        for metric in request.metrics[: request.numMetrics]:
            metric.nvmlReturn, metric.value = 0, shown[metric.metricId]
        return request

    members: dict[str, Any] = {
        "NVMLError": NVMLError,
        "NVML_SUCCESS": 0,
        "NVML_ERROR_NOT_SUPPORTED": NOT_SUPPORTED,
        "NVML_ERROR_FUNCTION_NOT_FOUND": FUNCTION_NOT_FOUND,
        "NVML_ERROR_NO_PERMISSION": 4,
        "NVML_TEMPERATURE_GPU": 0,
        "NVML_CLOCK_SM": 1,
        "NVML_MEMORY_ERROR_TYPE_UNCORRECTED": 1,
        "NVML_VOLATILE_ECC": 0,
        "NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX": 138,
        "NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX": 139,
        "nvmlClocksEventReasonSwPowerCap": 4,
        "nvmlClocksEventReasonHwSlowdown": 8,
        "nvmlClocksEventReasonSwThermalSlowdown": 32,
        "nvmlClocksEventReasonHwThermalSlowdown": 64,
        "nvmlClocksEventReasonHwPowerBrakeSlowdown": 128,
        "NVML_GPM_METRICS_GET_VERSION": 1,
        "NVML_GPM_METRIC_SM_UTIL": 2,
        "NVML_GPM_METRIC_ANY_TENSOR_UTIL": 5,
        "NVML_GPM_METRIC_DRAM_BW_UTIL": 10,
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetHandleByUUID": by_uuid,
        "nvmlDeviceGetUtilizationRates": lambda handle: SimpleNamespace(gpu=50, memory=10),
        "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(used=3 << 30, total=80 << 30),
        "nvmlDeviceGetPowerUsage": lambda handle: 350_000,
        "nvmlDeviceGetTemperatureV": lambda handle, sensor: 61,
        "nvmlDeviceGetTemperature": lambda handle, sensor: 60,
        "nvmlDeviceGetClockInfo": lambda handle, kind: 1980,
        "nvmlDeviceGetCurrentClocksEventReasons": lambda handle: 4 | 1,
        "nvmlDeviceGetTotalEccErrors": lambda handle, kind, since: 2,
        "nvmlDeviceGetTotalEnergyConsumption": energy,
        "nvmlDeviceGetFieldValues": field_values,
        "nvmlDeviceIsMigDeviceHandle": lambda handle: SimpleNamespace(value=int(handle == MIG_HANDLE)),
        "nvmlDeviceGetGpuInstanceId": lambda handle: 3,
        "nvmlDeviceGetDeviceHandleFromMigDeviceHandle": lambda handle: HANDLE,
        "nvmlGpmQueryDeviceSupport": lambda handle: SimpleNamespace(isSupportedDevice=1),
        "nvmlGpmSampleAlloc": SimpleNamespace,
        "nvmlGpmSampleGet": gpm_get,
        "nvmlGpmMigSampleGet": lambda handle, part, sample: gpm_get((handle, part), sample),
        "c_nvmlGpmMetricsGet_t": lambda: SimpleNamespace(metrics=[SimpleNamespace() for _ in range(98)]),
        "nvmlGpmMetricsGet": gpm_metrics,
    }
    for name, member in {**members, **changed}.items():
        if isinstance(member, NVMLError):
            member = _raising(member)
        if member is not None:
            setattr(module, name, _counted(module, name, member) if name.startswith(("nvmlD", "nvmlG")) else member)
    return module


def _raising(error: NVMLError) -> Any:
    def function(*_: Any) -> Any:
        raise error

    return function


def _counted(module: Any, name: str, function: Any) -> Any:
    def call(*arguments: Any) -> Any:
        module.calls[name] = module.calls.get(name, 0) + 1
        if module.failing is not None and "Handle" not in name:
            raise module.failing
        return function(*arguments)

    return call

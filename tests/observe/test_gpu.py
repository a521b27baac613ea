"""Telemetry of a GPU, on an imaginary one."""

from __future__ import annotations

import logging
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from asd_megatron.observe.gpu import GpuTelemetry
from asd_megatron.observe.nvml import GPM_METRICS, MAX_FAILURES, NvmlUnavailable, open_device, uuid_forms
from tests.observe.fake_nvml import FUNCTION_NOT_FOUND, MIG_HANDLE, NOT_SUPPORTED, UNKNOWN, UUID, NVMLError, fake_pynvml


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Makes `pynvml` an imaginary module, and ends the telemetry of the test."""

    def make(**changed: Any) -> Any:
        module = fake_pynvml(**changed)
        monkeypatch.setitem(sys.modules, "pynvml", module)
        return module

    yield make
    assert not [thread for thread in threading.enumerate() if thread.name == "gpu telemetry"]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_one_step(install: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    """Two samples between two calls; counters by what they grew."""
    module, clock = install(), Clock()
    telemetry = GpuTelemetry(open_device(UUID), seconds=3600, clock=clock)
    telemetry.start()
    powers = iter([300_000, 400_000])
    module.nvmlDeviceGetPowerUsage = lambda handle: next(powers)
    reasons = iter([4 | 64, 1])
    module.nvmlDeviceGetCurrentClocksEventReasons = lambda handle: next(reasons)
    with caplog.at_level(logging.WARNING):
        telemetry._sample()
        telemetry._sample()
    clock.now += 0.5
    found = telemetry.take()
    telemetry.close()
    sent = 2 * 4 * 1000 * 1024  # both directions of four links
    assert found == {
        "gpu/utilization": 0.5,
        "gpu/memory_used_gib": 3.0,
        "gpu/power_w": 350.0,
        "gpu/temperature_c": 61.0,
        "gpu/sm_clock_mhz": 1980.0,
        "gpu/throttled": 0.5,
        "gpu/ecc_uncorrected": 2.0,
        "gpu/sm_active": 0.8,
        "gpu/tensor_active": 0.45,
        "gpu/dram_active": 0.6,
        "gpu/energy_kj": pytest.approx(0.25),
        "gpu/nvlink_gbps": pytest.approx(sent / 1e9 / 0.5),
    }
    assert caplog.text.count("held down: hardware thermal slowdown, software power cap") == 1


def test_the_thread_samples_and_short_steps_have_values(install: Callable[..., Any]) -> None:
    module = install()
    telemetry = GpuTelemetry(open_device(UUID), seconds=0.01)
    telemetry.start()
    wait_until(lambda: module.calls.get("nvmlDeviceGetPowerUsage", 0) >= 3)
    energies = [telemetry.take()["gpu/energy_kj"] for _ in range(3)]
    assert energies == pytest.approx([0.25] * 3)  # nothing is lost or counted twice between steps
    assert telemetry.running and telemetry.take()["gpu/power_w"] == 350.0
    telemetry.close()
    assert not telemetry.running


@pytest.mark.parametrize(
    ("changed", "missing"),
    [
        ({"nvmlDeviceGetPowerUsage": NVMLError(NOT_SUPPORTED)}, {"gpu/power_w"}),
        ({"nvmlDeviceGetTotalEnergyConsumption": None}, {"gpu/energy_kj"}),
        ({"nvmlGpmQueryDeviceSupport": NVMLError(FUNCTION_NOT_FOUND)}, set(GPM_METRICS)),
        ({"nvmlDeviceGetFieldValues": NVMLError(NOT_SUPPORTED)}, {"gpu/nvlink_gbps"}),
        # older drivers and packages: another function has the same
        ({"nvmlDeviceGetTemperatureV": None}, set()),
        ({"nvmlDeviceGetTemperatureV": NVMLError(FUNCTION_NOT_FOUND)}, set()),
        (
            {
                "nvmlDeviceGetCurrentClocksEventReasons": None,
                "nvmlDeviceGetCurrentClocksThrottleReasons": lambda handle: 8,
            },
            set(),
        ),
    ],
)  # fmt: skip
def test_what_a_gpu_does_not_tell(
    install: Callable[..., Any], changed: dict[str, Any], missing: set[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The other metrics stay; it is asked and said once."""
    module = install()
    complete = GpuTelemetry(open_device(UUID), seconds=3600)
    expected = set()
    for _ in range(3):
        expected = set(complete.take())
    module = install(**changed)
    telemetry = GpuTelemetry(open_device(UUID), seconds=3600)
    with caplog.at_level(logging.INFO):
        steps = [set(telemetry.take()) for _ in range(3)]
    assert steps[-1] == expected - missing
    name = next(iter(changed))
    if missing:
        assert module.calls.get(name, 0) <= 1
        assert caplog.text.count("this GPU does not report") == 1 and min(missing) in caplog.text


def test_a_lost_gpu_ends_the_thread(install: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    """After ten failures in succession, with one line; the step goes on without numbers."""
    module = install()
    telemetry = GpuTelemetry(open_device(UUID), seconds=0.01)
    with caplog.at_level(logging.INFO):
        telemetry.start()
        wait_until(lambda: bool(module.calls.get("nvmlDeviceGetPowerUsage")))
        module.failing = NVMLError(UNKNOWN)
        before = module.calls["nvmlDeviceGetUtilizationRates"]
        wait_until(lambda: not telemetry.running)
    assert module.calls["nvmlDeviceGetUtilizationRates"] - before <= MAX_FAILURES + 1
    assert [r.levelname for r in caplog.records if "telemetry" in r.message] == ["WARNING"]
    assert "Unknown Error" in caplog.text
    telemetry.take()
    assert telemetry.take() == {}
    telemetry.close()


def test_single_failures_are_forgiven(install: Callable[..., Any]) -> None:
    module = install()
    telemetry = GpuTelemetry(open_device(UUID), seconds=3600)
    for _ in range(3):
        module.failing = NVMLError(UNKNOWN)
        for _ in range(MAX_FAILURES - 1):
            assert telemetry.take() == {}
        module.failing = None
        assert telemetry.take()["gpu/power_w"] == 350.0


def test_a_reading_that_hangs_delays_no_step(install: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    hang = threading.Event()
    module = install()
    telemetry = GpuTelemetry(open_device(UUID), seconds=0.01)
    telemetry.start()
    wait_until(lambda: bool(module.calls.get("nvmlDeviceGetPowerUsage")))
    monkeypatch.setattr("asd_megatron.observe.gpu.LONGEST_WAIT", 0.05)
    module.nvmlDeviceGetMemoryInfo = lambda handle: hang.wait()
    calls = module.calls["nvmlDeviceGetUtilizationRates"]
    wait_until(lambda: module.calls["nvmlDeviceGetUtilizationRates"] > calls)
    started = time.monotonic()
    assert telemetry.take() == {}
    telemetry.close()
    assert time.monotonic() - started < 2 and telemetry.running
    hang.set()
    wait_until(lambda: not telemetry.running)


def test_the_forms_of_a_uuid(install: Callable[..., Any]) -> None:
    raw = uuid.UUID(UUID).bytes
    for given in (UUID, UUID.encode(), raw, uuid.UUID(UUID)):
        assert uuid_forms(given) == [f"GPU-{UUID}", f"MIG-{UUID}"]
    assert uuid_forms(f"MIG-{UUID}") == [f"MIG-{UUID}"]
    assert uuid_forms(f"GPU-{UUID}\0".encode()) == [f"GPU-{UUID}"]

    # a part of a GPU: its own counters come through the whole GPU
    module = install()
    module.known = {f"MIG-{UUID}": MIG_HANDLE}
    telemetry = GpuTelemetry(open_device(UUID), seconds=3600)
    for _ in range(2):
        found = telemetry.take()
    assert found["gpu/sm_active"] == 0.8
    assert "nvmlGpmSampleGet" not in module.calls and module.calls["nvmlGpmMigSampleGet"] == 2


def test_why_there_is_no_telemetry(install: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    install()
    with pytest.raises(NvmlUnavailable, match="does not know this rank's GPU, GPU-00.* or MIG-00"):
        open_device("00000000-0000-0000-0000-000000000000")
    install(nvmlInit=NVMLError(UNKNOWN))
    with pytest.raises(NvmlUnavailable, match="Unknown Error"):
        open_device(UUID)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(NvmlUnavailable, match=r"nvidia-ml-py is not installed.*asd_megatron\[telemetry\]"):
        open_device(UUID)

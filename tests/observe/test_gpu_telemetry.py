"""Which readings of NVML a real GPU answers to this user, and that a process with telemetry ends at once."""

from __future__ import annotations

import time

import pytest
import torch

from asd_megatron.observe.flops import peak_flops
from asd_megatron.observe.gpu import open_gpu
from asd_megatron.observe.memory import PeakMemory
from asd_megatron.observe.nvml import GPM_METRICS, open_device

pytestmark = pytest.mark.gpu
BASIC = {"gpu/utilization", "gpu/memory_used_gib", "gpu/power_w", "gpu/temperature_c", "gpu/sm_clock_mhz"}


def busy(seconds: float) -> None:
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for _ in range(20):
            a @ a
        torch.cuda.synchronize()


def test_the_readings_of_this_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    device = open_device(torch.cuda.get_device_properties(0).uuid)
    device.gauges()
    busy(1.0)
    found = device.gauges() | device.counters()
    device.close()
    name = torch.cuda.get_device_name()
    with capsys.disabled():
        print(f"\n{name}, peak {peak_flops(name, 'bfloat16')}")
        for metric, value in sorted(found.items()):
            print(f"  {metric:<24} {value:.4g}")
        print(
            f"  not told: {', '.join(sorted({*BASIC, *GPM_METRICS, 'gpu/energy_kj', 'gpu/nvlink_gbps'} - set(found)))}"
        )
    assert set(found) >= BASIC
    assert 0 < found["gpu/power_w"] < 2000 and found["gpu/memory_used_gib"] > 0


def test_a_busy_second_is_seen() -> None:
    telemetry = open_gpu(seconds=0.2)
    telemetry.take()
    memory = PeakMemory.of_this_machine()
    with memory.phase("update"):
        busy(2.0)
    found = telemetry.take()
    assert found["gpu/utilization"] > 0.2
    if "gpu/energy_kj" in found:
        assert found["gpu/energy_kj"] == pytest.approx(found["gpu/power_w"] * 2e-3, rel=1.0)
    assert memory.take()["memory/peak_gib_update"] > 0.09
    started = time.monotonic()
    telemetry.close()
    assert time.monotonic() - started < 1.0

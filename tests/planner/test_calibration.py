"""Rates measured on this machine become an accelerator; no absolute figures."""

from __future__ import annotations

import math

import pytest

from asd_megatron.planner import calibration
from asd_megatron.planner.calibration import best_seconds, calibrate
from asd_megatron.planner.compute import Rates


def test_the_shortest_run_counts_and_the_first_does_not() -> None:
    times = iter([0.0, 10.0, 10.5, 20.0, 20.25, 30.0, 31.0])  # limit, then begin and end of three runs
    runs: list[int] = []
    assert best_seconds(lambda: runs.append(1), lambda: next(times), repeats=3) == 0.25
    assert len(runs) == 4


def test_a_calibrated_machine_reaches_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "SECONDS", 0.01)
    monkeypatch.setattr(calibration, "STREAMED", {"cpu": 1 << 22, "cuda": 1 << 26})
    monkeypatch.setattr(calibration, "SIZES", {"cpu": 128, "cuda": 2048})
    gpu = calibrate("float32")
    rates = Rates.of(gpu, "float32")
    found = (rates.products, rates.attention, rates.memory, rates.launch)
    assert all(math.isfinite(rate) and rate > 0 for rate in found)
    if gpu.name == "cpu":
        assert (rates.products, rates.memory) == (gpu.float32, gpu.memory_rate)

"""What a run measures: nothing where there is nothing to measure, and once what is missing."""

from __future__ import annotations

import gzip
import pickle
import sys
import threading
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from asd_megatron.config import AnyRecipe, load_recipe
from asd_megatron.distributed.layout import Layout
from asd_megatron.errors import UserError
from asd_megatron.models.flops import forward_flops
from asd_megatron.observe.hardware_names import MEASURED_PHASES
from asd_megatron.observe.memory import PeakMemory
from asd_megatron.observe.names import PHASES
from asd_megatron.observe.profiler import HISTORY_ENTRIES, recorded
from asd_megatron.observe.writer import read_metrics
from asd_megatron.records import ComputedPacks
from asd_megatron.run.clock import Clock
from asd_megatron.run.telemetry import Telemetry
from tests.e2e.world import World, make_world
from tests.observe.fake_nvml import UUID, fake_pynvml
from tests.observe.test_flops import DENSE, TWO

GIB = 1 << 30


class FakeCuda:
    """torch.cuda's peaks of memory: each allocation is freed again, 1 GiB stays."""

    def __init__(self) -> None:
        self.peak, self.reserved = GIB, 2 * GIB

    def allocate(self, gib: int) -> None:
        self.peak, self.reserved = max(self.peak, gib * GIB), max(self.reserved, (gib + 1) * GIB)

    def max_memory_allocated(self) -> int:
        return self.peak

    def max_memory_reserved(self) -> int:
        return self.reserved

    def reset_peak_memory_stats(self) -> None:
        self.peak, self.reserved = GIB, 2 * GIB


def test_peaks_of_phases_and_of_the_step() -> None:
    cuda = FakeCuda()
    memory = PeakMemory(cuda)
    cuda.allocate(9)
    assert memory.take()["memory/peak_gib"] == 9
    cuda.allocate(7)  # outside of phases
    with memory.phase("teacher"):
        cuda.allocate(3)
    for gib in (5, 4):
        with memory.phase("update"):
            cuda.allocate(gib)
    assert memory.take() == {
        "memory/peak_gib": 7,
        "memory/reserved_gib": 8,
        "memory/peak_gib_teacher": 3,
        "memory/peak_gib_update": 5,
    }
    assert memory.take() == {"memory/peak_gib": 1, "memory/reserved_gib": 2}


@pytest.fixture
def recipe(tmp_path: Any) -> AnyRecipe:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: {path: m}\ndata: {train: d}\nreward: {name: math}\n")
    return load_recipe(path)


class Alone:
    """A group of one rank."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1


def telemetry_of(recipe: AnyRecipe, dtype: torch.dtype = torch.bfloat16) -> Telemetry:
    groups: Any = SimpleNamespace(world=Alone(), host=Alone())
    port: Any = SimpleNamespace(shape=replace(DENSE), dtype=dtype)
    return Telemetry(recipe, port, Layout(), groups, Clock())


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An imaginary H100 with NVML; returns the module."""
    module = fake_pynvml()
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=UUID))
    monkeypatch.setattr(PeakMemory, "of_this_machine", classmethod(lambda cls: cls(FakeCuda())))
    return module


TIMES = {"update": 2.0, "total": 4.0}


def test_a_gpu_is_measured(recipe: AnyRecipe, gpu: Any) -> None:
    telemetry = telemetry_of(recipe)
    with ExitStack() as closing:
        assert telemetry.watch(closing) == []
        telemetry.clock.take()
        found = telemetry.of_step(TIMES, ComputedPacks(trained=[TWO]))
        assert found["gpu/power_w"] == 350.0 and found["memory/peak_gib"] == 1.0
        flops = 3 * forward_flops(telemetry.flops, TWO)
        assert found["perf/mfu"] == found["perf/hfu"] == pytest.approx(flops / 2.0 / 989e12)
        running = telemetry._gpu
    assert running is not None and not running.running


def test_what_is_missing_is_said_and_costs_nothing(
    recipe: AnyRecipe, gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Z1")
    telemetry = telemetry_of(recipe)
    with ExitStack() as closing:
        peak, nvml = telemetry.watch(closing)
        assert "no perf/mfu" in peak and "NVIDIA Z1" in peak and "nvidia-ml-py is not installed" in nvml
        found = telemetry.of_step(TIMES, ComputedPacks(trained=[TWO]))
    assert not {name for name in found if name.startswith("gpu/")} and "perf/mfu" not in found
    assert found["perf/tflops_per_gpu"] > 0
    assert not [thread for thread in threading.enumerate() if thread.name == "gpu telemetry"]

    off = recipe.model_copy(update={"logging": recipe.logging.model_copy(update={"telemetry": "off"})})
    with ExitStack() as closing:
        assert len(telemetry_of(off).watch(closing)) == 1  # of the peak
    assert "float32" in telemetry_of(off, torch.float32).watch(ExitStack())[0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert telemetry_of(recipe).watch(ExitStack()) == []


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("telemetry"))


def test_every_phase_that_is_measured_is_declared(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A complete run over a pretended GPU's memory."""
    monkeypatch.setattr(PeakMemory, "of_this_machine", classmethod(lambda cls: cls(FakeCuda())))
    folder = world.train(
        "measured",
        data={"test": str(world.problems)},
        evaluation={"every": 1, "problems": 2},
        checkpoint={"every": 1},
        algorithm={"kl_coefficient": 0.1, "updates_per_batch": 2},
    )
    last = read_metrics(folder)[-1]
    found = {name.removeprefix("memory/peak_gib_") for name in last if name.startswith("memory/peak_gib_")}
    assert found == set(MEASURED_PHASES) and found < set(PHASES)
    assert last["perf/idle_fraction"] == pytest.approx(
        sum(last[f"time/{phase}"] for phase in ("rollout", "reward", "weight_sync")) / last["time/total"]
    )
    assert last["perf/tflops_per_gpu"] > 0 and "perf/mfu" not in last


def test_a_memory_history_beside_the_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch.cuda.memory records it; where this release cannot, the trace is written alone."""
    calls: list[Any] = []
    history = ("all", "python", HISTORY_ENTRIES)

    def record(enabled: str | None = "all", context: str = "all", stacks: str = "all", max_entries: int = 0) -> None:
        calls.append((enabled, stacks, max_entries) if enabled else None)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", record)
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda: {"segments": [], "recording": calls[-1] == history})
    with recorded() as write:
        torch.zeros(3).add(1)
    assert calls == [history, None] and not list(tmp_path.iterdir())
    write(tmp_path, 12, 0)
    trace, dumped = tmp_path / "step_000012_rank_0.json.gz", tmp_path / "step_000012_rank_0_memory.pickle"
    assert sorted(tmp_path.iterdir()) == [trace, dumped]
    assert b"aten::add" in gzip.decompress(trace.read_bytes())
    assert pickle.loads(dumped.read_bytes()) == {"segments": [], "recording": True}

    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", None)
    with recorded() as write:
        pass
    write(tmp_path, 13, 0)
    assert [p.name for p in tmp_path.glob("step_000013*")] == ["step_000013_rank_0.json.gz"]


def test_steps_to_profile_that_the_run_does_not_have(tmp_path: Any) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: {path: m}\ndata: {train: d}\nreward: {name: math}\nrun: {steps: 5, profile_steps: [1, 6]}\n"
    )
    with pytest.raises(UserError, match=r"run.profile_steps \[6\].*run.steps 5"):
        load_recipe(path)
    with pytest.raises(UserError, match="run.profile_steps"):
        load_recipe(path, ["--run.profile_steps", "[0]"])
    assert load_recipe(path, ["--run.profile_steps", "[5]"]).run.profile_steps == (5,)
    assert load_recipe(path, ["--run.profile_steps", "null"]).run.profile_steps is None

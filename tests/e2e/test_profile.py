"""A run with a trace of one step and a port for Prometheus."""

from __future__ import annotations

import gzip
import json
import socket

import pytest

from asd_megatron import train
from asd_megatron.observe import prometheus
from asd_megatron.observe.writer import read_metrics
from tests.e2e.world import World, make_world, refusal, supervised, write_lines
from tests.observe.test_prometheus import free_port, samples


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("profile"))


def test_a_trace_of_one_step(world: World) -> None:
    """With the phases of the step by name; a second attempt replaces what the first left."""
    folder = world.train("traced", run={"steps": 3, "profile_steps": [2]})
    assert [p.name for p in (folder / "profile").iterdir()] == ["step_000002_rank_0.json.gz"]
    with gzip.open(folder / "profile" / "step_000002_rank_0.json.gz") as file:
        events = json.load(file)["traceEvents"]
    names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert [name for name in names if name in ("rollout", "teacher", "update")] == ["rollout", "teacher", "update"]
    assert any(event["name"] == "aten::mm" for event in events)
    rows = read_metrics(folder)
    assert [row["step"] for row in rows if "time/profile" in row] == [3]  # written between the steps

    again = world.train("traced", run={"steps": 3, "overwrite": True})
    assert again == folder and not (folder / "profile").exists()


def test_no_trace_is_left_by_a_step_that_fails_or_on_a_full_disk(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr("asd_megatron.run.rl.update", fail)
    with pytest.raises(RuntimeError, match="broken"):
        world.train("failed", run={"profile_steps": [1]})
    assert not (world.run_folder("failed") / "profile").exists()
    monkeypatch.undo()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("asd_megatron.observe.profiler.gzip.open", full)
    recipe = world.recipe(run={"profile_steps": [1]})  # the profiler has ended with the step before
    message = refusal(capsys, train.main, [str(recipe), "--run.name", "full"])
    assert "profile cannot be written (No space left on device)" in message and "free space" in message
    assert list((world.run_folder("full") / "profile").iterdir()) == []


def test_the_supervised_stage(world: World) -> None:
    write_lines(world.folder / "examples.jsonl", [{"prompt": f"w{i} w2", "response": f"w{i} w4"} for i in range(12)])
    recipe = world.recipe("sft.yaml")
    sections = {
        "run": {"folder": str(world.folder / "runs" / "{name}"), "steps": 2, "profile_steps": [1]},
        "model": {"path": str(world.model)},
        "data": {"train": str(world.folder / "examples.jsonl")},
        "sft": {"sequences_per_step": 4},
        "logging": {"progress": False, "tensorboard": False, "curves": False},
        "checkpoint": {"every": 0, "export_at_end": False},
    }
    recipe.write_text(json.dumps(sections))
    folder = supervised(world, "sft", recipe)
    assert [p.name for p in (folder / "profile").iterdir()] == ["step_000001_rank_0.json.gz"]
    assert all(row["perf/tflops_per_gpu"] > 0 and "perf/idle_fraction" not in row for row in read_metrics(folder))


def test_prometheus(world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every step is published; a port in use is refused before the run folder is touched."""
    published: list[str] = []

    def publish(self: prometheus.MetricsServer, step: int, metrics: dict[str, float]) -> None:
        published.append(prometheus.exposition(step, metrics, self._run))

    monkeypatch.setattr(prometheus.MetricsServer, "publish", publish)
    port = free_port()
    folder = world.train("served", "--logging.prometheus_port", str(port))
    assert [samples(text)["asd_megatron_step"] for text in published] == [1, 2]
    last = {f"asd_megatron_{name.replace('/', '_')}": value for name, value in read_metrics(folder)[-1].items()}
    assert samples(published[-1]).items() <= last.items() and 'run="served"' in published[-1]

    with socket.create_server(("127.0.0.1", port)):  # it was closed with the run
        message = refusal(
            capsys,
            train.main,
            [str(world.recipe()), "--run.name", "refused", "--logging.prometheus_port", str(port)],
        )
    assert f"logging.prometheus_port {port}" in message and "choose another port" in message
    assert not world.run_folder("refused").exists()

"""A run that is asked to stop, and is started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from asd_megatron import sft
from asd_megatron.checkpoint import training
from asd_megatron.distributed import activity
from asd_megatron.distributed.stop_signals import ranks_of
from asd_megatron.observe.writer import read_metrics
from asd_megatron.records import Group
from asd_megatron.rollout.collector import Collector
from asd_megatron.rollout.embedded.engine import EmbeddedEngine
from asd_megatron.run import rl
from asd_megatron.run.evaluation import HeldOut
from asd_megatron.run.history import read_history
from asd_megatron.run.rl import TrainingRun
from asd_megatron.run.session import Session
from asd_megatron.run.stopping import StopRequested
from asd_megatron.trainer import passes
from tests.e2e.test_sft import recipe as supervised_recipe
from tests.e2e.test_sft import taught
from tests.e2e.world import ROOT, World, call, metrics, steps

__all__ = ["taught"]

SETTINGS: dict[str, Any] = {"run": {"steps": 4}, "checkpoint": {"every": 0}, "algorithm": {"name": "antisd"}}


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, Callable[[Session], None]], None]]:
    """Calls a function in the middle of a step, before its metrics are written."""
    write = Session.write_metrics

    def at(step: int, action: Callable[[Session], None]) -> None:
        def write_metrics(session: Session, current: int, values: Any) -> None:
            write(session, current, values)
            if current == step:
                action(session)

        monkeypatch.setattr(Session, "write_metrics", write_metrics)

    yield at


def send(session: Session) -> None:
    os.kill(os.getpid(), signal.SIGUSR1)
    signals = session.stopping._signals
    while signals is not None and signals.received is None:
        time.sleep(0.01)


@pytest.fixture(scope="module")
def straight(world: World) -> Path:
    return world.train("uninterrupted", **SETTINGS)


def test_it_resumes_as_if_nothing_had_happened(
    world: World, straight: Path, ask: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ASD_MEGATRON_COMMAND", "asd-megatron train r.yaml")
    ask(2, lambda session: (session.folder / "stop").touch())  # metrics are written in the background: step 2 or 3
    stopped = world.train("asked", **SETTINGS)
    (step,) = {2, 3} & {int(p.name[-6:]) for p in (stopped / "checkpoints").glob("step_*")}
    said = capsys.readouterr().err
    assert f"stopped at step {step} because RUN/stop asks for it: state saved in {stopped}/checkpoints/step_" in said
    assert said.endswith("; continue with: asd-megatron train r.yaml\n")
    assert steps(stopped) == list(range(1, step + 1)) and not (stopped / "summary.json").exists()
    assert read_history(stopped)[-1]["event"] == "stop" and not (stopped / "stop").exists()
    monkeypatch.undo()
    assert world.train("asked", **SETTINGS) == stopped
    assert metrics(stopped) == metrics(straight) and json.loads((stopped / "summary.json").read_text())["completed"]


def test_a_step_in_flight_is_abandoned(world: World, straight: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the engine of SGLang servers does while it waits for rollouts."""
    collect = Collector.next

    def next_groups(collector: Collector, step: int) -> list[Group]:
        if step == 3:
            raise StopRequested("SIGUSR1")
        return collect(collector, step)

    monkeypatch.setattr(Collector, "next", next_groups)
    folder = world.train("waiting", **SETTINGS)
    assert steps(folder) == [1, 2] and (folder / "checkpoints" / "step_000002").is_dir()
    monkeypatch.undo()
    world.train("waiting", **SETTINGS)
    assert metrics(folder) == metrics(straight)


def test_an_evaluation_in_flight_is_given_up(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the step that it belongs to, which is complete."""
    evaluate = Collector.evaluate

    def evaluation(collector: Collector, *arguments: Any, step: int, **options: Any) -> Any:
        if step == 2:
            raise StopRequested("time_limit")
        return evaluate(collector, *arguments, step=step, **options)

    monkeypatch.setattr(Collector, "evaluate", evaluation)
    settings = {**SETTINGS, "data": {"test": str(world.problems)}, "evaluation": {"every": 2, "problems": 2}}
    folder = world.train("evaluating", **settings)
    assert steps(folder) == [0, 1, 2] and "evaluation/accuracy" not in read_metrics(folder)[-1]
    assert (folder / "checkpoints" / "step_000002").is_dir() and read_history(folder)[-1]["learned"] == 2


def _after_ctrl_c(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose first call gets the signal. (A later one would be a second request.)"""
    calls: list[int] = []

    def interrupted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            signal.raise_signal(signal.SIGINT)
        return function(*arguments, **options)

    return interrupted


PLACES: dict[str, tuple[Any, str]] = {
    "rollout": (EmbeddedEngine, "collect"),
    "scoring": (passes, "score_teacher"),
    "update": (rl, "update"),
    "evaluation": (HeldOut, "evaluate"),
    "checkpoint": (training, "save"),
}


def test_ctrl_c_in_every_phase_of_a_step(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """One run, interrupted in each phase in turn and continued: the metrics are those of one that was not."""
    evaluated = {
        "data": {"test": str(world.problems)},
        "evaluation": {"every": 1, "problems": 2, "at_start": False},
    }
    settings: dict[str, Any] = {**SETTINGS, **evaluated, "run": {"steps": 6}, "checkpoint": {"every": 1}}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores the signal
    for step, (module, function) in enumerate(PLACES.values(), 1):
        with monkeypatch.context() as patched:
            patched.setattr(module, function, _after_ctrl_c(getattr(module, function)))
            folder = world.train("ctrl_c", **settings)
        last = read_history(folder)[-1]
        assert (last["event"], last["step"], last["cause"]) == ("stop", step, "SIGINT"), function
        assert (folder / "checkpoints" / f"step_{step:06d}").is_dir()
    signal.signal(signal.SIGINT, before)
    world.train("ctrl_c", **settings)
    assert metrics(folder) == metrics(world.train("no_ctrl_c", **settings))


def test_a_request_before_the_first_step(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """While it is evaluated before that, say: once the run has started."""
    start = TrainingRun.start

    def started(run: TrainingRun) -> None:
        start(run)
        activity.enter("evaluation")
        send(run.session)

    monkeypatch.setattr(TrainingRun, "start", started)
    folder = world.train("early", **SETTINGS)
    assert steps(folder) == [] and read_history(folder)[-1]["learned"] == 0
    assert "stopped at step 0 after SIGUSR1: nothing was learned yet; continue with" in capsys.readouterr().err


def test_weights_that_are_not_worth_saving(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("asd_megatron.run.stopping.Stopping.after_step", lambda self, step: "SIGTERM")
    monkeypatch.setattr(Session, "not_finite", lambda self: "the weights are not finite (w)")
    folder = world.train("broken", **SETTINGS)
    assert not (folder / "checkpoints").exists()
    said = capsys.readouterr().err
    assert "stopped at step 1 after SIGTERM: state not saved (the weights are not finite (w); there is no" in said
    assert read_history(folder)[-1]["checkpoint"] is None


def test_the_supervised_stage(taught: World, ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = supervised_recipe(
        taught, run={"steps": 5}, checkpoint={"every": 0, "export_at_end": False}, evaluation={"every": 2}
    )
    assert call(sft.main, [str(path), "--run.name", "uninterrupted"]) == 0
    ask(3, send)
    folder = taught.run_folder("asked")
    assert call(sft.main, [str(path), "--run.name", "asked"]) == 0
    assert steps(folder) == [0, 1, 2, 3] and read_history(folder)[-1]["cause"] == "SIGUSR1"
    monkeypatch.undo()
    assert call(sft.main, [str(path), "--run.name", "asked"]) == 0
    assert metrics(folder) == metrics(taught.run_folder("uninterrupted"))


def test_torchrun_whose_ranks_and_agent_all_get_the_signal(world: World) -> None:
    """As Slurm sends it, to a job whose agent ignores it: status 0 on every rank, and the state of one step."""
    path = world.recipe(**{**SETTINGS, "run": {"folder": str(world.folder / "runs" / "{name}"), "steps": 5000}})
    options = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2"]
    module = ["-m", "asd_megatron.train", str(path), "--run.name", "signalled", "--parallelism.tensor", "2"]
    command = [sys.executable, "-m", "torch.distributed.run", *options, *module]
    folder = world.run_folder("signalled")
    with subprocess.Popen(
        ["bash", "-c", 'trap "" USR1; exec "$@"', "bash", *command],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            while not (folder / "metrics.jsonl").exists() or len(steps(folder)) < 2:
                assert process.poll() is None
                time.sleep(0.1)
            for target in (process.pid, *ranks_of(process.pid)):
                os.kill(target, signal.SIGUSR1)
            _, err = process.communicate(timeout=120)
        finally:
            process.kill()  # the ranks end with it
    assert process.returncode == 0, err
    (line,) = [line for line in err.splitlines() if line.startswith("stopped at step")]
    assert "after SIGUSR1: state saved in" in line and line.endswith("continue with: the same command")
    (checkpoint,) = (folder / "checkpoints").glob("step_*")
    assert steps(folder)[-1] == int(checkpoint.name[-6:])

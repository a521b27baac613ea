"""A run that stops and is started again."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from asd_megatron import train
from asd_megatron.antisd import perplexity
from asd_megatron.checkpoint.huggingface import is_complete, write_folder
from asd_megatron.config import load_recipe
from asd_megatron.errors import UserError
from asd_megatron.models.port import ModelPort
from asd_megatron.observe.names import undocumented
from asd_megatron.observe.writer import read_metrics
from asd_megatron.records import Group
from asd_megatron.run import session
from asd_megatron.run.history import read_history
from asd_megatron.run.rl import TrainingRun
from tests.e2e.world import World, dump, metrics, refusal, responses, steps

ANTISD: dict[str, dict[str, Any]] = {
    "run": {"dump_rollouts": True, "steps": 6},
    "algorithm": {"name": "antisd"},
    "data": {},
    "optimizer": {"schedule": "cosine", "warmup_steps": 2},
    "evaluation": {"every": 2, "problems": 4},
}


RELEASED_FORM = {
    "name": "antisd",
    "lambda_source": "teacher_perplexity",
    "outlier_deviations": 1.0,
    "term_normalization": "sequence",
    "advantage_weight": 0.5,
}


@pytest.mark.parametrize("warmup_steps", [2, 4])
@pytest.mark.parametrize("source", ["gate", "perplexity"])
def test_straight_and_interrupted(
    world: World, source: str, warmup_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint is that of step 3: of what sets lambda after its warm-up, and in it."""
    options = {**ANTISD, "data": {"test": str(world.problems)}, "checkpoint": {"every": 3}}
    options["checkpoint"]["async_save"] = source == "gate"
    if source == "gate":
        options["gate"] = {"warmup_steps": warmup_steps, "tau_down": 0.99}
        if warmup_steps == 4:  # and with two copies of weights in the checkpoint
            options["teacher"] = {"weights": "ema", "ema_rate": 0.2}
            options["algorithm"] = {"name": "antisd", "kl_coefficient": 0.1}
    else:
        monkeypatch.setattr(perplexity, "UNUSABLE_MEAN", math.inf)  # a random model's perplexities
        options["algorithm"] = RELEASED_FORM
        options["perplexity"] = {"warmup_steps": warmup_steps, "cutoff": 1e3, "target_ratio": 0.9}
    straight = world.train(f"straight_{source}_{warmup_steps}", **options)
    # the same run, killed in step 6: after the checkpoint of step 3, with metrics and dumps of later steps
    stopped = world.run_folder(f"stopped_{source}_{warmup_steps}")
    shutil.copytree(straight, stopped)
    shutil.rmtree(stopped / "checkpoints" / "step_000006")
    (stopped / "checkpoints" / "latest").write_text("step_000003\n")
    lines = (stopped / "metrics.jsonl").read_text().splitlines(keepends=True)
    (stopped / "metrics.jsonl").write_text("".join(lines[:-1]) + lines[-1][:40])
    (stopped / "summary.json").unlink()
    resumed = world.train(stopped.name, **options)

    assert steps(resumed) == [0, 1, 2, 3, 4, 5, 6]  # no hole, nothing twice
    assert metrics(straight) == metrics(resumed)
    for step in range(4, 7):
        assert responses(straight, step) == responses(resumed, step)
        assert dump(straight, step).info.h_warm == dump(resumed, step).info.h_warm
        lambdas = dump(straight, step).lambdas
        assert lambdas == dump(resumed, step).lambdas and (lambdas is None) == (source == "gate")
        if lambdas is not None:
            assert (len(set(lambdas)) > 2) == (step > warmup_steps)
        assert {e.rollout.weight_version for e in dump(resumed, step).examples} == {step - 1}
    assert sorted(p.name for p in (resumed / "checkpoints").iterdir()) == ["latest", "step_000003", "step_000006"]
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (straight, resumed)]
    for one in summaries:
        assert one["completed"] and one["changed_settings"] == []
        del one["name"], one["recipe_hash"]
    assert summaries[0] == summaries[1]
    if source == "perplexity":
        rows = read_metrics(straight)[1:]
        assert undocumented(name for row in rows for name in row) == []
        assert not any(name.startswith("gate/") for row in rows for name in row) and "gate" not in summaries[0]
        assert [row["perplexity/warming_up"] for row in rows] == [1.0] * warmup_steps + [0.0] * (6 - warmup_steps)
        assert [row["outliers/limit"] is None for row in rows] == [bool(row["perplexity/warming_up"]) for row in rows]
        assert rows[-1]["perplexity/target"] == summaries[0]["perplexity"]["target"] > 1.01
        assert rows[-1]["lambda/max"] > 0 and 0 < rows[-1]["outliers/share"] < 0.9
    assert summaries[0]["accuracy_before"] == read_metrics(straight)[0]["evaluation/accuracy"]


def test_back_to_an_older_checkpoint(world: World) -> None:
    """Of the run's own folder, by its path: the later steps are repeated."""
    options = {"run": {"steps": 4}, "checkpoint": {"every": 2}}
    folder = world.train("back", **options)
    before = metrics(folder)
    # stopped before it repeats step 4: it resumes from step 2, not from the step 4 of before
    again = ["--checkpoint.resume", str(folder / "checkpoints" / "step_000002")]
    world.train("back", *again, "--run.steps", "3", "--checkpoint.every", "0", **options)
    assert steps(folder) == [1, 2, 3]
    world.train("back", "--run.steps", "6", **options)  # and a finished run can be made longer
    assert metrics(folder)[:4] == before and steps(folder) == [1, 2, 3, 4, 5, 6]


def test_a_finished_run_started_again_builds_no_model(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"checkpoint": {"every": 2, "export_at_end": True}}
    folder = world.train("finished", **options)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(ModelPort, "build", None)
        world.train("finished", **options)
    assert "nothing is left to do" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before


@pytest.fixture
def stop_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[int]]:
    """Steps before which a run is stopped."""
    original, chosen = TrainingRun.collect, set[int]()

    def collect(self: TrainingRun, step: int) -> list[Group]:
        if step in chosen:
            raise UserError("stopped")
        return original(self, step)

    monkeypatch.setattr(TrainingRun, "collect", collect)
    yield chosen


def test_a_run_stopped_before_its_first_checkpoint_starts_again(
    world: World, stop_before: set[int], capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"run": {"steps": 3}, "checkpoint": {"every": 3}}
    stop_before.add(3)
    folder = world.train("stopped_early", expect=2, **options)
    before = metrics(folder)
    assert [row["step"] for row in before] == [1, 2] and not (folder / "summary.json").exists()
    stop_before.clear()
    assert "stopped before its first checkpoint" not in capsys.readouterr().err
    world.train("stopped_early", **options)
    assert "stopped before its first checkpoint" in capsys.readouterr().err
    assert metrics(folder)[:2] == before and steps(folder) == [1, 2, 3]
    assert [event["event"] for event in read_history(folder)] == ["fresh", "restart", "end"]


def test_changed_settings_are_listed_or_refused(
    world: World, stop_before: set[int], capsys: pytest.CaptureFixture[str]
) -> None:
    """10 updates of 4 a step, then others of 1: the schedule stays where the steps are."""
    linear = {"learning_rate": 1e-3, "schedule": "linear"}
    options = {"run": {"steps": 4}, "checkpoint": {"every": 2}, "optimizer": linear, "algorithm": {"name": "grpo"}}
    straight = world.train("all_with_1", **options)
    expected = [row["optimizer/learning_rate"] for row in read_metrics(straight)]

    stop_before.add(3)
    folder = world.train("changed", "--algorithm.updates_per_batch", "4", expect=2, **options)
    stop_before.clear()
    argv = [str(world.recipe(**options)), "--run.name", "changed", "--sampling.temperature", "0.5"]
    message = refusal(capsys, train.main, argv)
    assert "sampling.temperature: 1.0 -> 0.5" in message and "checkpoint.accept_changes" in message
    assert load_recipe(folder / "recipe.yaml").sampling.temperature == 1.0
    world.train("changed", "--sampling.temperature", "0.5", "--checkpoint.accept_changes", "all", **options)

    said = capsys.readouterr().err
    assert "algorithm.updates_per_batch: 4 -> 1" in said and "sampling.temperature: 1.0 -> 0.5" in said
    assert f"learning rate: linear schedule over 4 steps of 1 update, {expected[2]:.3g} at step 3" in said
    found = [row["optimizer/learning_rate"] for row in read_metrics(folder)]
    assert found[2:] == expected[2:]
    changed = json.loads((folder / "summary.json").read_text())["changed_settings"]
    assert [(c["step"], c["key"]) for c in changed] == [
        (2, "algorithm.updates_per_batch"),
        (2, "sampling.temperature"),
    ]
    # made longer, the schedule spans the new length
    world.train("changed", "--sampling.temperature", "0.5", **{**options, "run": {"steps": 8}})
    found = [row["optimizer/learning_rate"] for row in read_metrics(folder)]
    assert found[4:] == pytest.approx([1e-3 * (8 - step) / 8 for step in range(4, 8)])


@pytest.fixture(scope="module")
def grpo(world: World) -> Path:
    """Checkpoint of another run after step 3."""
    options = {"run": {"steps": 3}, "algorithm": {"name": "grpo"}, "checkpoint": {"every": 3}}
    return world.train("grpo", **options) / "checkpoints" / "step_000003"


def test_continual_antisd_from_a_grpo_checkpoint(world: World, grpo: Path) -> None:
    options = {**ANTISD, "gate": {"warmup_steps": 2}, "evaluation": {"every": 0}}
    folder = world.train("continual", "--checkpoint.resume", str(grpo), **options)
    rows = read_metrics(folder)
    assert [row["step"] for row in rows] == [4, 5, 6]
    assert [row["gate/warming_up"] for row in rows] == [1, 1, 0]  # H_warm anew, over the new warm-up steps
    assert rows[2]["gate/h_warm"] == min(row["gate/entropy"] for row in rows[:2])
    assert [row["gate/lambda"] for row in rows[:2]] == [0, 0]
    assert {e.rollout.weight_version for e in dump(folder, 4).examples} == {3}


def test_the_weights_and_moments_of_another_run(world: World, grpo: Path) -> None:
    """Resumed in another folder, the same steps as in the run's own."""
    own = world.train("grpo_longer", "--run.steps", "5", algorithm={"name": "grpo"})
    other = world.train(
        "grpo_elsewhere", "--run.steps", "5", "--checkpoint.resume", str(grpo), algorithm={"name": "grpo"}
    )
    assert metrics(own)[3:] == metrics(other)


def test_a_checkpoint_without_the_copies_that_the_recipe_needs(
    world: World, grpo: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """model.path has the initial weights if the checkpoint's run was trained from it; nothing else has the average."""
    penalised = {"run": {"steps": 4}, "algorithm": {"name": "grpo", "kl_coefficient": 0.1, "kl_estimator": "k3"}}
    resume = ["--checkpoint.resume", str(grpo)]
    folder = world.train("penalised", *resume, **penalised)
    said = capsys.readouterr()
    assert "initial weights: those of model.path" in said.err
    assert "copies of weights" in said.out and "0.1 x k3 to the initial weights" in said.out
    (row,) = read_metrics(folder)
    assert row["kl/k3"] > 0 and row["kl/k2"] > 0  # step 4: three steps away from them
    assert "time/reference" in row and not {"time/teacher", "time/student"} & row.keys()  # passes that did not run

    def refused(*overrides: str, **sections: dict[str, Any]) -> str:
        argv = [str(world.recipe(**sections)), "--run.name", "refused_copies", *overrides, *resume]
        return refusal(capsys, train.main, argv)

    averaged = {"run": {"steps": 4}, "algorithm": {"name": "no_gate"}, "teacher": {"weights": "ema"}}
    message = refused(**averaged)
    assert "stores no moving average" in message and "set teacher.weights" in message
    shutil.copytree(world.model, tmp_path / "model")
    message = refused("--model.path", str(tmp_path / "model"), **penalised)
    assert f"began from {world.model}" in message and "set model.path as it was" in message


def test_checkpoints_that_cannot_be_used(
    world: World, grpo: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def refused(*overrides: str) -> str:
        argv = [str(world.recipe(algorithm={"name": "grpo"})), "--run.name", "refused", *overrides]
        message = refusal(capsys, train.main, argv)
        assert not world.run_folder("refused").exists()
        return message

    message = refused("--checkpoint.resume", str(grpo), "--run.steps", "3")
    assert "after step 3 and run.steps is 3" in message and "set run.steps above 3" in message
    assert "is not a folder" in refused("--checkpoint.resume", str(grpo / "none"))
    message = refused("--checkpoint.resume", str(tmp_path))
    assert "is no training checkpoint" in message and "give a folder checkpoints/step_NNNNNN" in message
    message = refused(
        "--checkpoint.resume", str(grpo), "--parallelism.distributed_optimizer", "true", "--run.steps", "9"
    )
    assert "set parallelism.distributed_optimizer as it was" in message


def test_an_export_that_was_killed_is_made_at_the_next_start(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = set()

    def recorded(*arguments: Any, max_shard_bytes: int, **others: Any) -> Path:
        sizes.add(max_shard_bytes)
        return write_folder(*arguments, max_shard_bytes=max_shard_bytes, **others)

    monkeypatch.setattr(session, "write_folder", recorded)
    options = {"checkpoint": {"every": 2, "export_at_end": True, "shard_bytes": 5 << 20}}
    folder = world.train("killed_export", **options)
    export = folder / "hf" / "step_000002"
    partial = export.with_name(".step_000002.0123456789ab.partial")

    export.rename(partial)  # killed while it was written: summary.json is written after it
    (folder / "summary.json").unlink()
    world.train("killed_export", **options)
    assert is_complete(export) and not partial.exists()

    for damage in (
        lambda: (export / "model.safetensors").unlink(),
        lambda: os.utime(export / "config.json", (0, 0)),  # older than the checkpoint: of an abandoned branch
    ):
        (export / "mark").touch()
        damage()
        world.train("killed_export", **options)
        assert is_complete(export) and not (export / "mark").exists()

    export.rename(partial)  # of a step in between: before the run continues
    world.train("killed_export", "--run.steps", "3", "--checkpoint.export_every", "2", **options)
    assert is_complete(export) and is_complete(folder / "hf" / "step_000003") and not partial.exists()
    assert sizes == {5 << 20}

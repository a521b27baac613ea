"""A training run that meets numbers that are not finite: where it stops, what it skips, what it saves."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from asd_megatron import train
from asd_megatron.config import load_recipe
from asd_megatron.observe.dumps import bad_dump_path, read_dump
from asd_megatron.observe.writer import read_metrics
from asd_megatron.records import Group
from asd_megatron.rollout.collector import Collector
from asd_megatron.rollout.engine import RolloutError
from asd_megatron.run.rl import TrainingRun
from asd_megatron.run.session import open_session
from asd_megatron.trainer import passes, spikes
from asd_megatron.trainer.columns import Scores
from asd_megatron.trainer.guard import NotFinite
from tests.e2e.world import call, without_torchrun
from tests.puzzle_recipe import write_recipe


def recipe_file(folder: Path, **algorithm: Any) -> Path:
    return write_recipe(
        folder / "recipe.yaml",
        run={"steps": 6},
        algorithm={"name": "no_gate", **algorithm},
        sampling={"rollouts_per_problem": 3},
        checkpoint={"every": 1},
    )


@pytest.fixture
def run(tmp_path: Path) -> Iterator[TrainingRun]:
    recipe = load_recipe(str(recipe_file(tmp_path)))
    with without_torchrun(), open_session(recipe) as session:
        run = TrainingRun(recipe, session)
        run.start()
        yield run


def bad_weights(run: TrainingRun) -> None:
    with torch.no_grad():
        next(iter(run.port.chunks[0].parameters())).fill_(math.nan)


def test_an_engine_that_reports_no_number(run: TrainingRun) -> None:
    first, *others = run.collect(1)
    rollout = first.rollouts[1]
    bad = replace(rollout, logprobs=(*rollout.logprobs[:-1], math.nan))
    groups = [Group(first.problem, (first.rollouts[0], bad, *first.rollouts[2:]), first.rewards), *others]
    place = f"{rollout.prompt_id}/1 at response position {len(rollout.response_ids) - 1}"
    with pytest.raises(NotFinite, match=f"step 1, rollout: the engine's log-prob is not finite for 1 token .*{place}"):
        run.build_batch(groups, 1)
    kept = read_dump(bad_dump_path(run.session.folder, 1))
    assert place in str(kept.info.reason) and len(kept.examples) == 6
    assert kept.table["engine_logprobs"].isnan().sum() == 1


def test_a_teacher_pass_without_numbers(run: TrainingRun) -> None:
    batch = run.build_batch(run.collect(1), 1)
    bad_weights(run)
    with pytest.raises(NotFinite, match="step 1, teacher scoring: teacher_logprobs is not finite"):
        run.score_teacher(batch)
    kept = read_dump(bad_dump_path(run.session.folder, 1))
    assert str(kept.info.reason).startswith("step 1, teacher scoring") and kept.table["teacher_logprobs"].isnan().any()


def test_an_update_whose_forward_pass_has_no_numbers(run: TrainingRun) -> None:
    batch = run.build_batch(run.collect(1), 1)
    teacher = run.score_teacher(batch)
    lam = run.gate_step(batch, teacher, None)
    bad_weights(run)
    with pytest.raises(NotFinite, match="step 1, update: student_logprobs is not finite"):
        run.update(batch, teacher, None, lam)


def test_a_student_pass_without_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the program: one line, exit status 2, and the checkpoint of the step before is there."""
    original, passed = passes.score_student, 0

    def score(*arguments: Any, **how: Any) -> Scores | None:
        nonlocal passed
        passed += 1
        found = original(*arguments, **how)
        if found is not None and passed == 2:
            found.entropy[0] = math.inf
        return found

    monkeypatch.setattr(passes, "score_student", score)
    assert call(train.main, [str(recipe_file(tmp_path, updates_per_batch=2))]) == 2
    assert "error: step 2, student scoring: student_entropy is not finite for 1 token" in capsys.readouterr().err
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1]
    assert (tmp_path / "run" / "checkpoints" / "step_000001").is_dir()


@pytest.fixture
def overflowing(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Gradient norms of the optimizer's steps by number (from 1) that overflow."""
    from asd_megatron.trainer.optimizer import Optimizer, StepResult

    original, steps, chosen = Optimizer.step, [0], set[int]()

    def step(self: Optimizer, *, loss: float = 0.0) -> StepResult:
        steps[0] += 1
        if steps[0] in chosen:
            next(iter(self.port.chunks[0].parameters())).main_grad.view(-1)[0] = math.inf
        return original(self, loss=loss)

    monkeypatch.setattr(Optimizer, "step", step)
    return chosen


def test_a_single_overflow_is_skipped_and_counted(tmp_path: Path, overflowing: set[int]) -> None:
    overflowing |= {2, 4, 5}
    assert call(train.main, [str(recipe_file(tmp_path))]) == 0
    rows = read_metrics(tmp_path / "run")
    assert [row["optimizer/skipped"] for row in rows] == [0, 1, 0, 1, 1, 0]
    assert [row["optimizer/grad_norm"] is None for row in rows] == [False, True, False, True, True, False]
    dumps = sorted((tmp_path / "run" / "rollouts").iterdir())
    assert [path.name for path in dumps] == [f"bad_step_00000{step}.parquet" for step in (2, 4, 5)]
    kept = read_dump(dumps[0])
    reason = str(kept.info.reason)
    assert reason.startswith("update skipped: loss ") and reason.endswith("norm inf") and "pmi" in kept.table


def test_a_model_that_an_update_has_destroyed_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From step 2 on the same distribution on every batch, and no gradient: known after step 4, whose checkpoint is not
    written. With run.stop_when_dead false it is a warning."""
    original = TrainingRun.observe

    def observe(self: TrainingRun, step: int, *arguments: Any) -> None:
        original(self, step, *arguments)
        if step == 1:
            for weight in self.port.chunks[0].parameters():
                weight.detach().zero_()

    monkeypatch.setattr(TrainingRun, "observe", observe)
    recipe = [str(recipe_file(tmp_path)), "--checkpoint.every", "2", "--run.overwrite", "true"]
    assert call(train.main, recipe) == 2
    assert "error: step 4: the model cannot learn any more: the gradient has been 0" in capsys.readouterr().err
    assert [row.get("warnings/learns_nothing") for row in read_metrics(tmp_path / "run")] == [None, None, None, 1]
    assert checkpoints(tmp_path) == ["latest", "step_000002"]
    assert call(train.main, [*recipe, "--checkpoint.resume", "never", "--run.stop_when_dead", "false"]) == 0
    assert capsys.readouterr().err.count("warning: the model cannot learn any more") == 1


def test_a_spike_of_the_gradient_norm_is_skipped_and_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said, counted, its batch kept; the norms before it are part of the checkpoint."""
    from asd_megatron.trainer.optimizer import Optimizer, StepResult

    original, steps = Optimizer.step, [0]

    def step(self: Optimizer, *, loss: float = 0.0) -> StepResult:
        steps[0] += 1
        if steps[0] == 4:
            for parameter in self.port.chunks[0].parameters():
                parameter.main_grad.mul_(1e3)
        return original(self, loss=loss)

    monkeypatch.setattr(Optimizer, "step", step)
    monkeypatch.setattr(spikes, "FEWEST", 3)
    recipe = [str(recipe_file(tmp_path)), "--optimizer.grad_spike", "skip", "--optimizer.grad_spike_factor", "20"]
    assert call(train.main, [*recipe, "--run.steps", "3"]) == 0  # the spike is the first update after the resumption
    assert call(train.main, recipe) == 0
    rows = read_metrics(tmp_path / "run")
    assert [row["optimizer/spikes"] for row in rows] == [row["optimizer/skipped"] for row in rows] == [0, 0, 0, 1, 0, 0]
    assert rows[3]["optimizer/grad_norm"] > rows[2]["optimizer/spike_limit"]
    assert "step 4: gradient norm " in capsys.readouterr().err
    assert bad_dump_path(tmp_path / "run", 4).is_file()


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "run" / "checkpoints").iterdir())


def test_a_row_of_overflows_stops_and_leaves_the_last_good_checkpoint(
    tmp_path: Path, overflowing: set[int], capsys: pytest.CaptureFixture[str]
) -> None:
    """No checkpoint is written while updates are being skipped; the same command resumes before them."""
    overflowing |= {3, 4, 5, 6}
    recipe = str(recipe_file(tmp_path))
    assert call(train.main, [recipe]) == 2
    err = capsys.readouterr().err
    assert "error: step 6, update: " in err and "4. update in a row" in err
    assert "no checkpoint after step 3: the last update was skipped" in err and "step_000002" in err
    rows = read_metrics(tmp_path / "run")
    assert [row.get("checkpoint/skipped") for row in rows] == [None, None, 1, 1, 1]
    assert checkpoints(tmp_path) == ["latest", "step_000001", "step_000002"]
    assert not (tmp_path / "run" / "summary.json").exists()
    assert call(train.main, [recipe]) == 0  # the overflows are behind it
    assert [row["optimizer/skipped"] for row in read_metrics(tmp_path / "run")] == [0] * 6


def test_a_due_checkpoint_is_written_after_the_next_applied_update(tmp_path: Path, overflowing: set[int]) -> None:
    overflowing |= {3, 6}
    assert (
        call(train.main, [str(recipe_file(tmp_path)), "--checkpoint.every", "3", "--checkpoint.export_at_end", "true"])
        == 0
    )
    assert checkpoints(tmp_path) == ["latest", "step_000004"]
    assert (tmp_path / "run" / "hf" / "step_000006").is_dir()  # finite weights: those of step 5


def test_broken_weights_replace_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever notices first: the checkpoint that is due, or the sampling of the next step."""
    original, broken = TrainingRun.observe, {3}

    def observe(self: TrainingRun, step: int, *arguments: Any) -> None:
        original(self, step, *arguments)
        if step in broken:
            bad_weights(self)

    monkeypatch.setattr(TrainingRun, "observe", observe)
    for every, noticed in (("1", "step 3, checkpoint: the weights are not finite"), ("2", "while sampling")):
        recipe = [str(recipe_file(tmp_path)), "--checkpoint.every", every, "--run.overwrite", "true"]
        assert call(train.main, recipe) == 2
        err = capsys.readouterr().err
        assert noticed in err and "is saved: start" not in err
        assert (tmp_path / "run" / "checkpoints" / "latest").read_text().strip() == "step_000002"
        broken.clear()
        assert call(train.main, recipe) == 0
        assert len(read_metrics(tmp_path / "run")) == 6
        broken.add(3)


def test_servers_that_are_gone_save_and_stop_unless_the_state_is_bad(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overflowing: set[int], capsys: pytest.CaptureFixture[str]
) -> None:
    original, gone = Collector.next, {3}

    def collect(self: Collector, step: int) -> list[Group]:
        if step in gone:
            raise RolloutError("no server is left")
        return original(self, step)

    monkeypatch.setattr(Collector, "next", collect)
    recipe = [str(recipe_file(tmp_path)), "--checkpoint.every", "6"]
    assert call(train.main, recipe) == 2
    assert "no server is left. The state after step 2 is saved" in capsys.readouterr().err
    assert checkpoints(tmp_path) == ["latest", "step_000002"]

    gone |= {4}
    gone.remove(3)
    overflowing.add(3)
    assert call(train.main, recipe) == 2
    err = capsys.readouterr().err
    assert "The state after step 3 is not saved: the last update was skipped" in err
    assert "the newest checkpoint is step_000002" in err and checkpoints(tmp_path) == ["latest", "step_000002"]


def test_counters_are_metrics(tmp_path: Path) -> None:
    """Teacher sequences that cannot fit are counted step by step."""
    recipe = recipe_file(tmp_path)
    arguments = ["--run.steps", "2", "--privileged.max_teacher_tokens", "30", "--checkpoint.every", "0"]
    assert call(train.main, [str(recipe), *arguments]) == 0
    for row in read_metrics(tmp_path / "run"):
        assert row["demonstration/too_long"] == row["rollouts/masked"] == row["demonstration/none"] == 6
        assert row["demonstration/shortened"] == row["demonstration/empty"] == 0
        assert row["reward/timeouts"] == row["reward/errors"] == row["reward/restarts"] == 0
        assert row["rollouts/aborted"] == row["rollouts/redrawn_groups"] == row["rollouts/dropped_groups"] == 0

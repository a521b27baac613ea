"""Models evaluated during training and by the command: the same samples, kept through a kill, compared by problem."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from asd_megatron import evaluate
from asd_megatron.observe.names import undocumented
from asd_megatron.observe.writer import read_metrics
from tests.distributed.harness import RankError, run_ranks
from tests.e2e.world import World, call, refusal

STEPS = 2


@pytest.fixture(scope="module")
def run(world: World) -> Path:
    """A run with two sets of its own, one with another reward, and a checkpoint of each step."""
    sets = {
        "odd": {"data": str(world.problems), "samples": 4, "temperature": 1.0, "top_p": 1.0},
        "same": {"data": str(world.problems), "samples": 2, "reward": "exact", "max_new_tokens": 5, "problems": 6},
    }
    return world.train(
        "evaluated",
        run={"steps": STEPS},
        evaluation={"every": 1, "at_start": False, "sets": sets},
        rollout={"max_batch_size": 16},
        checkpoint={"every": 1, "keep": 2, "export_at_end": False},
    )


@pytest.fixture(scope="module")
def compared(run: Path) -> Path:
    """Where both checkpoints have been evaluated, on one rank."""
    before = sorted(path.name for path in run.iterdir())
    out = run.parent / "compared"
    assert call(evaluate.main, [str(run), "--all", "--out", str(out)]) == 0
    assert sorted(path.name for path in run.iterdir()) == before  # nothing of the run is touched
    return out


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return pq.read_table(folder / f"samples-{name}.parquet").to_pylist()


def test_sets_are_measured_during_training(run: Path) -> None:
    last = read_metrics(run)[-1]
    names = {name for name in last if name.startswith("evaluation/")}
    assert undocumented(names) == []
    assert {f"evaluation/odd/{m}" for m in ("avg@4", "avg@4_se", "pass@1", "pass@2", "pass@4", "errors")} <= names
    assert {f"evaluation/same/{m}" for m in ("avg@2", "pass@2", "length_mean", "truncated")} <= names
    assert 0 < last["evaluation/odd/avg@4"] < 1 and last["evaluation/same/avg@2"] == 0
    assert last["evaluation/same/length_mean"] <= 5 < last["evaluation/odd/length_mean"]
    assert "evaluation/accuracy" not in last
    summary = json.loads((run / "summary.json").read_text())
    assert summary["evaluation_after"]["evaluation/odd/avg@4"] == last["evaluation/odd/avg@4"]


def test_the_command_repeats_what_training_measured(
    run: Path, compared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a checkpoint, bit for bit; and compares the steps by problem."""
    out = compared
    folders = [out / f"evaluated_step_{step}" for step in (1, 2)]
    for row, folder in zip(read_metrics(run), folders, strict=True):
        found = results(folder)["sets"]
        for name, metric in (("odd", "avg@4"), ("odd", "pass@2"), ("same", "avg@2"), ("same", "truncated")):
            assert found[name]["metrics"][metric]["value"] == row[f"evaluation/{name}/{metric}"]
    kept = rows(folders[1], "odd")
    assert len(kept) == 12 * 4 and {row["problem"] for row in kept} == {f"p{i}" for i in range(12)}
    assert all(row["question"] in row["prompt"] and row["tokens"] > 0 for row in kept)
    comparison = json.loads((out / "comparison.json").read_text())
    assert comparison["baseline"] == "evaluated step 1"
    (odd, same) = comparison["differences"]
    apart = results(folders[1])["sets"]["odd"]["metrics"]["avg@4"]["value"]
    apart -= results(folders[0])["sets"]["odd"]["metrics"]["avg@4"]["value"]
    assert odd["metrics"]["avg@4"]["value"] == pytest.approx(apart) and same["set"] == "same"
    assert (out / "accuracy_over_steps.png").is_file() and (out / "pass_at_k.png").is_file()

    modified = [(folder / "samples-odd.parquet").stat().st_mtime_ns for folder in folders]
    assert call(evaluate.main, [str(run), "--all", "--out", str(out)]) == 0  # nothing is missing: no model is loaded
    assert "paired by problem" in capsys.readouterr().out
    assert [(folder / "samples-odd.parquet").stat().st_mtime_ns for folder in folders] == modified
    message = refusal(capsys, evaluate.main, [str(run), "--all", "--out", str(out), "--temperature", "0.5"])
    assert "temperature: 1.0 -> 0.5" in message and "--overwrite" in message


def _killed(rank: int, argv: list[str]) -> None:
    """Evaluate; every rank is killed when global rank 0 has recorded two batches."""
    from asd_megatron.evaluation.journal import Journal

    add = Journal.add
    batches: list[int] = []

    def counted(self: Journal, *arguments: Any) -> None:
        add(self, *arguments)
        batches.append(len(batches))
        if len(batches) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    Journal.add = counted  # type: ignore[method-assign]
    evaluate.main(argv)


def test_a_killed_evaluation_continues_with_the_rest(run: Path, compared: Path) -> None:
    """Killed on two ranks, continued on one: the rows are those of an evaluation that nothing interrupted."""
    killed = run.parent / "killed_evaluation"
    argv = [str(run), "--sets", "odd", "--rollout.max_batch_size", "8", "--out", str(killed)]
    with pytest.raises(RankError):
        run_ranks(_killed, 2, [*argv, "--parallelism.data", "2"])
    journal = killed / "journal-odd.jsonl"
    assert len(journal.read_text().splitlines()) == 1 + 2 * 4 and not (killed / "results.json").exists()
    assert call(evaluate.main, argv) == 0
    assert rows(killed, "odd") == rows(compared / "evaluated_step_2", "odd") and not journal.exists()
    assert results(killed)["sets"]["odd"]["metrics"] == results(compared / "evaluated_step_2")["sets"]["odd"]["metrics"]


def test_a_model_folder_without_a_recipe(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    out = world.folder / "of_folder"
    argv = [str(world.model), "--samples", "2", "--max-new-tokens", "4", "--problems", "3", "--out", str(out)]
    assert "no recipe that names problems" in refusal(capsys, evaluate.main, argv)
    given = ["--sets", f"a={world.problems}", "--reward", "exact", "--data.format", "raw", "--logging.progress", "true"]
    assert call(evaluate.main, [*argv, *given]) == 0
    assert [row["answer"] for row in rows(out, "a")] == ["w0", "w0", "w1", "w1", "w2", "w2"]
    assert results(out)["step"] == 0 and "a: problem 3/3" in capsys.readouterr().err

"""The command line of `asd-megatron evaluate`, what it means by a path, and the order of batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from asd_megatron.checkpoint import lineage
from asd_megatron.errors import UserError
from asd_megatron.records import Problem, Prompt
from asd_megatron.run.evaluating import batches
from asd_megatron.run.evaluation_request import read_request
from asd_megatron.run.subjects import Subject, subjects
from tests.puzzle_recipe import write_recipe


def found(*argv: str) -> list[Subject]:
    return subjects(read_request(argv))


def refusal(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        found(*argv)
    return str(caught.value)


def test_the_command_line() -> None:
    request = read_request(
        [
            "a",
            "b",
            "--run.seed",
            "3",
            "--sets",
            "x=f.jsonl",
            "y",
            "--top-p",
            "1",
            "--data.system=be short",
            "--step",
            "4",
        ]
    )
    assert request.what == ("a", "b") and request.sets == ("x=f.jsonl", "y") and request.steps == (4,)
    assert request.values == (("top_p", 1.0),)
    assert request.overrides == ("--run.seed", "3", "--data.system=be short")
    with pytest.raises(UserError, match="--all"):
        read_request(["a", "--all", "--step", "3"])
    with pytest.raises(UserError, match="evaluate:.*--sampels"):
        read_request(["a", "--sampels", "3"])


def test_a_recipe_with_its_sets_and_settings(tmp_path: Path) -> None:
    sets = {"hard": {"data": "puzzle:test", "samples": 16, "temperature": 1.0}}
    path = write_recipe(tmp_path / "r.yaml", evaluation={"samples": 4, "sets": sets}, data={"test": "puzzle:test"})
    (subject,) = found(str(path))
    assert list(subject.recipe.evaluation.sets) == ["hard", "test"] and subject.out == Path("evaluation/run")
    assert subject.recipe.data.test is None and subject.step == 0
    (subject,) = found(str(path), "--sets", "hard", "new=puzzle:train", "--samples", "2", "--out", str(tmp_path / "o"))
    hard, new = (subject.recipe.evaluation.sets[name] for name in ("hard", "new"))
    assert (hard.samples, hard.temperature, new.data, new.samples) == (2, 1.0, "puzzle:train", 2)
    assert subject.out == tmp_path / "o"
    assert "has no set of that name (hard, test)" in refusal(str(path), "--sets", "soft")
    assert "two sets are called" in refusal(str(path), "--sets", "a=puzzle:test", "a=puzzle:train")
    assert "those of --sets" in refusal(str(path), "--data.test", "puzzle:train")
    assert "give the run's folder" in refusal(str(path), "--step", "20")
    assert "give --sets NAME=FILE" in refusal(str(write_recipe(tmp_path / "none.yaml")))


def test_a_run_means_its_newest_checkpoint_and_its_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", data={"test": "puzzle:test"})
    run = tmp_path / "run"
    checkpoints = run / "checkpoints"
    (run / "evaluation").mkdir(parents=True)
    (run / "recipe.yaml").write_text(recipe.read_text())
    assert "no checkpoint and no export yet" in refusal(str(run))
    for step in (20, 40):
        (checkpoints / lineage.name(step)).mkdir(parents=True)
        (checkpoints / lineage.name(step) / lineage.RUN_STATE).write_text("{}")
    lineage.write_latest(checkpoints, lineage.name(40))
    (newest,) = found(str(run))
    assert newest.kind == "checkpoint" and newest.step == 40
    assert newest.out == run / "evaluation" / "step_000040" and newest.label.endswith(" step 40")
    assert [s.step for s in found(str(run), "--all")] == [20, 40]
    start, later = found(str(run), "--step", "0", "--step", "20")
    assert (start.kind, start.step, later.step) == ("folder", 0, 20)
    (itself,) = found(str(checkpoints / "step_000020"))
    assert itself.step == 20 and itself.weights == checkpoints / "step_000020"
    monkeypatch.chdir(checkpoints / "step_000020")
    assert found(".")[0].step == 20
    assert "no checkpoint or export of step 30: it has 20, 40" in refusal(str(run), "--step", "30")
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | {"parallelism": {"tensor": 2}}))
    assert "different parallelism sections" in refusal(str(run), str(other))
    assert "neither a checkpoint nor a model folder" in refusal(str(tmp_path))


def test_batches_do_not_depend_on_what_is_done() -> None:
    prompts = [Prompt(Problem(str(i), "", prompt=""), (1,) * (5 - i)) for i in range(5)]
    complete = list(batches(prompts, 4, 8, 1, set()))
    assert complete == [[4, 3], [2, 1], [0]]
    assert list(batches(prompts, 4, 8, 1, {4, 3, 2})) == complete[1:]
    assert list(batches(prompts, 16, 8, 2, set())) == [[4, 3], [2, 1], [0]]
    assert list(batches(prompts, 4, None, 2, {0, 3})) == [[1, 2, 4]]
    assert list(batches(prompts, 4, None, 2, set(range(5)))) == []

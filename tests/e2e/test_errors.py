"""What a user gets wrong ends with status 2 and one message that names cause and next step; nothing is left behind."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from asd_megatron import train
from asd_megatron.cli import main as cli
from asd_megatron.models.port import ModelPort
from asd_megatron.observe.writer import RunWriter, read_metrics
from asd_megatron.run.folder import hold
from tests.e2e.world import (
    World,
    call,
    change_weights,
    make_world,
    refusal,
    start,
    write_lines,
)
from tests.models.tiny import tokenizer

Sections = dict[str, dict[str, Any]]


@pytest.fixture
def fresh(tmp_path: Path) -> World:
    return make_world(tmp_path)


def refused(capsys: pytest.CaptureFixture[str], world: World, *overrides: str, **sections: dict[str, Any]) -> str:
    """The message of a training run that refuses before it makes its folder."""
    message = refusal(capsys, train.main, [str(world.recipe(**sections)), "--run.name", "refused", *overrides])
    assert not world.run_folder("refused").exists()
    return message


# -------------------------------------------------------------------- the recipe


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["--algorithm.lamda_max", "1"], ["algorithm.lamda_max", "the nearest valid one is algorithm.lambda_max"]),
        (["--optimizer.learning_rate", "fast"], ["optimizer.learning_rate: expected a number > 0", "'fast'"]),
        (["--sampling.top_p", "0.9"], ["sampling.top_p 0.9", "set sampling.top_p 1.0"]),
        (["--sampling.rollouts_per_problem", "1"], ["a group of one", "set it to 2 or more"]),
        (["--algorithm.updates_per_batch", "5"], ["does not divide the 12 rollouts", "choose a divisor"]),
        (["--gate.tau_down", "1.5", "--algorithm.name", "antisd"], ["gate.tau_down 1.5 is above gate.tau_up", "lower"]),
        (
            ["--parallelism.pipeline", "2", "--parallelism.virtual_pipeline", "2"],
            ["embedded rollouts sample", "stage by stage", "use rollout.engine sglang"],
        ),
        (["--parallelism.context", "2"], ["one token at a time", "use rollout.engine sglang"]),
        (["--rollout.engine", "replay"], ["needs rollout.replay_folder"]),
    ],
)
def test_a_recipe_that_cannot_work(
    fresh: World, capsys: pytest.CaptureFixture[str], overrides: list[str], words: list[str]
) -> None:
    message = refused(capsys, fresh, *overrides)
    assert all(word in message for word in words), message


def test_an_unknown_key_in_the_file(fresh: World, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, fresh, samplng={"top_p": 1.0})
    assert "recipe.yaml: samplng: unknown section; the nearest valid one is sampling" in message


def test_a_missing_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for main, argv in ((train.main, []), (cli.main, ["train"])):
        assert "none.yaml does not exist" in refusal(capsys, main, [*argv, str(tmp_path / "none.yaml")])
    assert "give a recipe first" in refusal(capsys, train.main, ["--run.steps", "3"])


def test_more_ranks_than_were_started(fresh: World, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, fresh, "--parallelism.tensor", "2")
    assert "1 rank does not divide into model copies of 2" in message and "start a multiple of 2 ranks" in message
    message = refused(capsys, fresh, "--parallelism.data", "4")
    assert "needs 4 ranks and there is 1: start 4, or set parallelism.data 1" in message


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["--parallelism.tensor", "3"], ["does not divide the model's 4 attention heads", "one of 1, 2"]),
        (["--parallelism.pipeline", "3"], ["the model has 2 layers, fewer than stages"]),
        (["--sampling.max_response_tokens", "120"], ["the model has 128 positions", "lower one of them by 24"]),
    ],
)
def test_a_layout_that_does_not_divide_starts_no_rank(
    fresh: World, capsys: pytest.CaptureFixture[str], overrides: list[str], words: list[str]
) -> None:
    message = refusal(capsys, cli.main, ["train", str(fresh.recipe()), "--run.name", "refused", *overrides])
    assert all(word in message for word in words), message


# -------------------------------------------------------------------- problems


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([{"prompt": "w1", "answer": "w2"}, '{"prompt": "w3", '], ["problems.jsonl:2: "]),
        ([{"prompt": "w1"}], ["problems.jsonl:1: `answer` is missing"]),
        ([{"answer": "w1"}], ["problems.jsonl:1: ", "`prompt`"]),
        ([], ["problems.jsonl has no problems", "write one JSON object a line"]),
        ([{"prompt": "w1", "answer": "w2"}], ["has 1 problem, fewer than the 3", "lower sampling.problems_per_step"]),
        (
            [{"prompt": f"w{i} " * length, "answer": "w2"} for i, length in enumerate((1, 40, 50))],
            ["2 of the problems have prompts longer", "sampling.max_prompt_tokens (32)", "raise", "to 53"],
        ),
    ],
)
def test_problems_that_cannot_be_used(
    fresh: World, capsys: pytest.CaptureFixture[str], lines: list[Any], words: list[str]
) -> None:
    write_lines(fresh.problems, lines)
    message = refused(capsys, fresh)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("key", ["train", "test"])
def test_a_missing_problem_file(fresh: World, capsys: pytest.CaptureFixture[str], key: str) -> None:
    message = refused(capsys, fresh, data={key: str(fresh.folder / "none.jsonl")})
    assert "cannot read" in message and "none.jsonl" in message and "Give the path of a data file" in message


# -------------------------------------------------------------------- the model folder


def _drop(world: World) -> None:
    change_weights(world.model, lambda tensors: tensors.__delitem__("model.layers.1.mlp.up_proj.weight"))


def _reshape(world: World) -> None:
    name = "model.layers.0.self_attn.q_norm.weight"
    change_weights(world.model, lambda tensors: tensors.__setitem__(name, torch.ones(5)))


def _more_words(world: World) -> None:
    tokenizer(80).save_pretrained(world.model)


def _no_template(world: World) -> None:
    (world.model / "chat_template.jinja").unlink()


def _other_family(world: World) -> None:
    path = world.model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": ["MambaForCausalLM"]}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_drop, ["model.layers.1.mlp.up_proj.weight", "incomplete"]),
        (_reshape, ["tensor model.layers.0.self_attn.q_norm.weight in", "model.safetensors has shape (5,)", "(12,)"]),
        (_more_words, ["vocab_size is 61", "ids up to 79", "mixes two models"]),
        (_no_template, ["no chat template", "set data.format to raw"]),
        (_other_family, ["MambaForCausalLM"]),
        (lambda world: (world.model / "model.safetensors").unlink(), ["neither model.safetensors nor"]),
        (lambda world: (world.model / "tokenizer.json").unlink(), ["tokenizer"]),
        (lambda world: (world.model / "config.json").unlink(), ["has no config.json"]),
    ],
)
def test_a_model_folder_that_cannot_be_used(
    fresh: World, capsys: pytest.CaptureFixture[str], damage: Callable[[World], None], words: list[str]
) -> None:
    damage(fresh)
    message = refused(capsys, fresh)
    assert all(word in message for word in words), message


def test_a_missing_model_folder(fresh: World, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, fresh, "--model.path", str(fresh.folder / "none"))
    assert "none does not exist" in message and "check model.path" in message


# -------------------------------------------------------------------- the reward


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("raise KeyError('tests')", ["raised KeyError", "problem p", "Fix the function, or set reward.on_error"]),
        ("return float('nan')", ["not finite", "Fix the function"]),
        ("return 'yes'", ["returned str, not a number", "Fix the function"]),
    ],
)
def test_a_reward_that_fails(fresh: World, capsys: pytest.CaptureFixture[str], body: str, words: list[str]) -> None:
    (fresh.folder / "reward.py").write_text(f"def reward(problem, response):\n    {body}\n")
    message = refusal(capsys, train.main, [str(fresh.recipe()), "--run.name", "stopped"])
    assert all(word in message for word in words), message


def test_a_reward_that_fails_and_counts_as_zero(fresh: World, capsys: pytest.CaptureFixture[str]) -> None:
    """Then all rewards are equal, which is said once, also by a run that is resumed."""
    (fresh.folder / "reward.py").write_text("def reward(problem, response):\n    return 1 / 0\n")
    options = {"reward": {"on_error": "zero"}, "checkpoint": {"every": 2}}
    folder = fresh.train("zero", **options)
    assert json.loads((folder / "summary.json").read_text())["warnings"] == []
    for steps in ("3", "4"):
        fresh.train("zero", "--run.steps", steps, **options)
    (warning,) = json.loads((folder / "summary.json").read_text())["warnings"]
    assert (warning["kind"], warning["step"]) == ("equal_rewards", 3)
    assert capsys.readouterr().err.count("warning: all rewards") == 1
    assert [row.get("warnings/equal_rewards") for row in read_metrics(folder)] == [None, None, 1, 1]


def test_a_reward_that_is_not_there(fresh: World, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, fresh, "--reward.name", f"{fresh.folder / 'reward.py'}:score")
    assert "has no 'score'; it has reward" in message
    assert "nowhere" in refused(capsys, fresh, "--reward.name", "nowhere:score")


# -------------------------------------------------------------------- the run folder


def test_a_run_folder_that_is_not_empty(fresh: World, capsys: pytest.CaptureFixture[str]) -> None:
    folder = fresh.train("taken")
    before = (folder / "metrics.jsonl").read_text()
    other = ["--algorithm.name", "grpo"]
    message = refusal(capsys, train.main, [str(fresh.recipe()), "--run.name", "taken", *other])
    assert "algorithm.name" in message and "another run.name" in message and "run.overwrite true" in message
    assert (folder / "metrics.jsonl").read_text() == before

    # what is wrong elsewhere is found before the old run is removed
    overwrite = [str(fresh.recipe()), "--run.name", "taken", "--run.overwrite", "true", *other]
    refusal(capsys, train.main, [*overwrite, "--data.train", "none.jsonl"])
    assert (folder / "metrics.jsonl").read_text() == before
    (folder / "left").touch()
    assert call(train.main, overwrite) == 0
    assert not (folder / "left").exists()


def test_overwriting_what_the_run_reads(fresh: World, capsys: pytest.CaptureFixture[str]) -> None:
    folder = fresh.train("taken", checkpoint={"export_at_end": True})
    exported = folder / "hf" / "step_000002"
    argv = [str(fresh.recipe()), "--run.name", "taken", "--run.overwrite", "true", "--model.path", str(exported)]
    message = refusal(capsys, train.main, argv)
    assert "with model.path" in message and "choose another run.name" in message
    assert (exported / "config.json").is_file()


def test_a_folder_that_is_no_run_is_left_alone(fresh: World, capsys: pytest.CaptureFixture[str]) -> None:
    folder = fresh.run_folder("mine")
    folder.mkdir(parents=True)
    (folder / "thesis.tex").touch()
    message = refusal(capsys, train.main, [str(fresh.recipe()), "--run.name", "mine", "--run.overwrite", "true"])
    assert "is no run folder; it is left alone" in message
    assert (folder / "thesis.tex").is_file()


@pytest.mark.parametrize("folder", ["recipe.yaml/run", "n" * 300])
def test_a_run_folder_that_cannot_be_made(
    fresh: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    monkeypatch.setattr(ModelPort, "build", None)  # said before the model is loaded
    path = fresh.folder / folder
    message = refusal(capsys, train.main, [str(fresh.recipe()), "--run.folder", str(path)])
    assert f"the run folder {path} cannot be made (" in message and "run.folder" in message


def test_a_run_folder_in_use(fresh: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelPort, "build", None)
    with ExitStack() as closing:
        hold(fresh.run_folder("live"), closing)
        for overwrite in ("false", "true"):
            argv = [str(fresh.recipe()), "--run.name", "live", "--run.overwrite", overwrite]
            assert f"in use by another run (process {os.getpid()} on" in refusal(capsys, train.main, argv)


@pytest.mark.parametrize("what", ["write", "text", "close"])
def test_a_full_disk(
    fresh: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Metrics that cannot be written end the run with a message; closing them later does not fail again."""

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(RunWriter, what, full)
    if what == "close":
        fresh.train("full")
        return
    message = refusal(capsys, train.main, [str(fresh.recipe()), "--run.name", "full"])
    assert "cannot be written (No space left on device)" in message
    assert not (fresh.run_folder("full") / "summary.json").exists()


# -------------------------------------------------------------------- through the command, on two ranks


def test_two_ranks_speak_once(fresh: World) -> None:
    """An error that only rank 0 can see, in the middle of a step."""
    (fresh.folder / "reward.py").write_text("def reward(problem, response):\n    return 1 / 0\n")
    argv = ["train", str(fresh.recipe()), "--run.name", "stopped", "--parallelism.data", "2"]
    found = start("asd_megatron.cli.main", *argv, cwd=fresh.folder)
    assert found.returncode == 2, found.stderr
    errors = [line for line in found.stderr.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and "raised ZeroDivisionError" in errors[0]
    assert "Traceback" not in found.stderr


def test_rollouts_that_take_longer_than_the_recipe_allows(fresh: World, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [str(fresh.recipe()), "--run.name", "late", "--rollout.collect_timeout", "1e-9"]
    assert call(train.main, argv) != 0
    err = capsys.readouterr().err
    assert "rollout.collect_timeout" in err and "Traceback" not in err

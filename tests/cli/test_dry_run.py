"""`--dry-run`: the checks of a run, its prompts and its passes, without a model or a rank."""

from __future__ import annotations

import json
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from asd_megatron.checkpoint import lineage
from asd_megatron.checkpoint.run_state import FORMAT
from asd_megatron.cli import launch
from asd_megatron.cli.main import main
from asd_megatron.config import load_recipe
from asd_megatron.files import write_json
from asd_megatron.models.port import ModelPort
from asd_megatron.run.folder import claim, hold, prepare
from tests.e2e.world import World, make_world, write_lines


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(launch, "run_ranks", lambda *_: pytest.fail("started"))
    monkeypatch.setattr(ModelPort, "build", lambda *_, **__: pytest.fail("built"))
    for name in ("TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return make_world(tmp_path)


def dry(kind: str, path: Path, *overrides: str) -> int:
    return main([kind, str(path), "--dry-run", *overrides])


def test_what_it_shows(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert dry("train", world.recipe(algorithm={"name": "antisd"}), "--parallelism.tensor", "2") == 0
    out = capsys.readouterr().out
    student, _, teacher = out.partition("student's prompt")[2].partition("teacher's prompt")
    problem = student.split("<user>")[1].split("<end>")[0].strip()
    assert problem in teacher and "Your previous attempt:\nw" in teacher
    assert "Your answer is correct." in teacher and "Your previous attempt" not in student
    warning = "above the 5 warm-up steps of the gate"  # the run is shorter
    for words in (
        "tensor 2",
        f"{world.run_folder('run')}: new",
        "advantage      A = A_seq - lambda * phi(u)",
        "0.001, constant schedule",
        "H_warm",
        "evaluation     none",
        warning,
        "teacher scoring pass",
        "4 a step in all",
        "reward.py:reward gives 1",
        "starts 2 ranks",
    ):
        assert words in out, out
    assert not (world.folder / "runs").exists()
    method = {"name": "sd", "estimator": "full_vocabulary", "advantage_weight": 0.0, "kl_coefficient": 0.1}
    assert dry("train", world.recipe(algorithm=method), "--teacher.weights", "ema") == 0
    out = capsys.readouterr().out
    assert "lambda * D, D = reverse KL(student, teacher)" in out and "moving average of the weights, rate 0.05" in out
    assert "0.1 x k2 to the initial weights, in the loss" in out
    counted = re.search(r"(\d+) problems checked, .* tokens, (\d+) with a solution", out)
    assert counted is not None and counted[1] == counted[2]
    assert dry("train", world.recipe(algorithm=method), "--privileged.use_reference", "false") == 0
    assert "(a verified solution of this problem)" in capsys.readouterr().out  # never the data's
    held_out = ["--data.test", str(world.problems), "--evaluation.every", "1"]
    assert dry("train", world.recipe(algorithm={"name": "grpo"}), *held_out) == 0
    out = capsys.readouterr().out
    assert "teacher's prompt" not in out and "starts 1 rank\n" in out and "no per-token term" in out
    assert f"{world.problems}, every step, at the start, at the end, temperature 0.7, top_p 0.95" in out


def test_fp8(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    """Layers are checked without Transformer Engine; the world's model has two."""
    fp8 = ["--precision.fp8", "current", "--precision.bf16_last_layers", "0"]
    assert dry("train", world.recipe(), *fp8) == 0
    out = capsys.readouterr().out
    assert "current scaling in the linear layers of layers 2 to 2 of 2" in out and "recipe has precision.fp8" in out
    assert dry("train", world.recipe(), *fp8[:2]) == 2
    assert "precision.bf16_last_layers 1 leave none" in capsys.readouterr().err


def test_what_becomes_of_the_run_folder(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    folder, path = world.run_folder("run"), world.recipe()

    def begin() -> None:
        with ExitStack() as closing:
            asked = load_recipe(path)
            prepare(asked, claim(asked, "train", closing), "train", 0)

    def said(*overrides: str, status: int = 0) -> str:
        before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        assert dry("train", path, *overrides) == status
        assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
        captured = capsys.readouterr()
        return " ".join((captured.out + captured.err).split())

    begin()
    assert "start again from step 1" in said()
    state = folder / "checkpoints" / lineage.name(1) / lineage.RUN_STATE
    state.parent.mkdir(parents=True)
    without_copies = {"format": FORMAT, "distributed_optimizer": False, "run_state": {}, "weight_copies": []}
    state.write_text(json.dumps(without_copies))
    lineage.name_latest(folder / "checkpoints", lineage.name(1))
    assert "would be resumed from step 1 of 2" in said()
    assert "optimizer.learning_rate: 0.001 -> 0.5" in said("--optimizer.learning_rate", "0.5")
    # refused: the summary comes all the same, and missing inputs come before it
    text = said("--sampling.temperature", "0.7", status=2)
    assert "refused" in text and "learning rate" in text and "sampling.temperature: 1.0 -> 0.7" in text
    text = said("--sampling.temperature", "0.7", "--data.train", "none.jsonl", status=2)
    assert "none.jsonl" in text and "sampling.temperature" not in text
    method = ["--algorithm.name", "sd", "--teacher.weights", "ema", "--checkpoint.accept_changes", "all"]
    assert "stores no moving average" in said(*method, status=2)
    with ExitStack() as closing:
        hold(folder, closing)
        assert "in use by another run (process" in said(status=2)
    write_json(folder / "summary.json", {"completed": True, "steps": 2})
    text = said("--optimizer.learning_rate", "0.5")
    assert "nothing is left to do" in text and str(folder / "summary.json") in text
    assert "ignored: settings that differ" in text and "0.001 -> 0.5" in text and "would be trained either" in text
    other = ["--run.name", "other"]
    assert "no training checkpoint" in said(*other, "--checkpoint.resume", str(world.model), status=2)
    assert "from the weights" in said(*other, "--checkpoint.resume", str(state.parent))
    (world.folder / "runs" / "file").touch()
    assert "cannot be made" in said("--run.name", "file", status=2)


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        ("import sys\ndef reward(problem, response): sys.exit(0)", ["reward"]),
        ("def reward(response): return 1.0", ["reward"]),
        ("def reward(problem, response): return 'good'", ["reward", "str"]),
    ],
)
def test_a_reward_that_cannot_be_used(
    world: World, capsys: pytest.CaptureFixture[str], reward: str, words: list[str]
) -> None:
    (world.folder / "reward.py").write_text(reward)
    assert dry("train", world.recipe()) == 2
    err = capsys.readouterr().err
    assert "error: " in err and all(word in err for word in words), err


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"data": {"train": "none.jsonl"}}, ["none.jsonl"]),
        ({"sampling": {"max_prompt_tokens": 2}}, ["sampling.max_prompt_tokens"]),
        ({"sampling": {"problems_per_step": 10_000}}, ["sampling.problems_per_step"]),
        ({"parallelism": {"tensor": 3}}, ["parallelism.tensor 3"]),
    ],
)
def test_what_the_run_would_refuse(
    world: World, capsys: pytest.CaptureFixture[str], sections: dict[str, Any], words: list[str]
) -> None:
    assert dry("train", world.recipe(**sections)) == 2
    err = capsys.readouterr().err
    assert all(word in err for word in words), err


def test_a_supervised_recipe(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = write_lines(world.folder / "corpus.jsonl", [{"prompt": "w1 w2", "response": "w3 w4"}] * 4)
    recipe = world.folder / "sft.yaml"
    recipe.write_text(f"model: {{path: {world.model}}}\ndata: {{train: {corpus}}}\nsft: {{sequences_per_step: 2}}\n")
    assert dry("sft", recipe) == 0
    out = capsys.readouterr().out
    assert "w1 w2" in out and "w3 w4" in out and "teacher" not in out
    write_lines(corpus, [{"prompt": "w1 w2"}])
    assert dry("sft", recipe) == 2
    assert "`response` is missing" in capsys.readouterr().err


def test_code_rewards(world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher reads how many of the tests that are run were passed; a machine without a sandbox is refused."""
    tests = [{"input": "1", "output": "1"}, {"function": "f", "arguments": [], "expected": 1}, {"assert": "f()"}]
    write_lines(
        world.problems,
        [{"id": f"p{i}", "prompt": f"w{i} w1", "answer": "w2", "solution": "w3", "tests": tests} for i in range(3)],
    )
    recipe = world.recipe(algorithm={"name": "antisd"}, reward={"name": "code"})
    assert dry("train", recipe, "--reward.code.max_tests", "2") == 0
    out = capsys.readouterr().out
    assert "code gives 0 for the response" in out and "Your code passes 0 of 2 test cases." in out
    assert dry("train", recipe, "--reward.code.memory", "1") == 2
    assert "reward.code.memory: unknown key; the keys of reward.code are python, memory_mb" in capsys.readouterr().err
    monkeypatch.setenv("PATH", "/nowhere")
    assert dry("train", recipe) == 2
    assert "no bwrap on the path" in capsys.readouterr().err
    assert dry("train", recipe, "--reward.allow_unsafe_sandbox", "true") == 0

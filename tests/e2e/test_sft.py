"""The supervised stage: on given responses, and a short version of the puzzle's warm start."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from asd_megatron import sft, train
from asd_megatron.observe.names import undocumented
from asd_megatron.observe.writer import read_metrics
from asd_megatron.puzzle.corpus import unprivileged_trace
from asd_megatron.puzzle.model import write_initial_model
from asd_megatron.puzzle.task import draw_puzzle
from asd_megatron.run.sources import SupervisedFile
from tests.e2e.world import World, call, make_world, metrics, refusal, start, write_lines

LINES = [{"prompt": f"w{i} w{(5 * i) % 7}", "response": f"w{i + 20} w{(3 * i) % 11}"} for i in range(8)]


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A world with given responses, and the same as problems to answer."""
    world = make_world(tmp_path_factory.mktemp("taught"))
    write_lines(world.folder / "given.jsonl", LINES)
    write_lines(world.folder / "asked.jsonl", [{"prompt": x["prompt"], "answer": x["response"]} for x in LINES])
    return world


def recipe(world: World, **sections: dict[str, Any] | None) -> Path:
    """A supervised recipe, with the sections given put in key by key; None leaves a section out."""
    own: dict[str, dict[str, Any]] = {
        "run": {"folder": str(world.folder / "runs" / "{name}"), "steps": 30},
        "model": {"path": str(world.model)},
        "sft": {"sequences_per_step": 6},
        "data": {"train": str(world.folder / "given.jsonl"), "test": str(world.folder / "asked.jsonl")},
        "reward": {"name": "exact"},
        "sampling": {"max_prompt_tokens": 16, "max_response_tokens": 8},
        "evaluation": {"every": 10, "temperature": 0.0},
        "optimizer": {"learning_rate": 1e-2, "weight_decay": 0.0},
    }
    for name, keys in sections.items():
        own[name] = {**own.get(name, {}), **(keys or {})}
    path = world.folder / "sft.yaml"
    path.write_text(yaml.safe_dump({name: own[name] for name in own if sections.get(name, own) is not None}))
    return path


def test_it_learns_given_responses(taught: World) -> None:
    """Through the command, as one rank: the loss falls, and the model answers what it was taught."""
    found = start("asd_megatron.cli.main", "sft", str(recipe(taught)), "--run.name", "learns", cwd=taught.folder)
    assert found.returncode == 0, found.stderr
    folder = taught.run_folder("learns")
    rows = read_metrics(folder)
    assert [row["step"] for row in rows] == list(range(31))
    assert undocumented(name for row in rows for name in row) == []
    assert rows[1]["sft/loss"] > 2 and rows[-1]["sft/loss"] < 0.05
    assert rows[0]["evaluation/accuracy"] == 0 and rows[-1]["evaluation/accuracy"] == 1
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["evaluation_before"]["evaluation/accuracy"] == 0
    assert summary["evaluation_after"]["evaluation/accuracy"] == 1
    assert {p.name for p in folder.iterdir()} >= {"curves.png", "environment.json", "hf", "recipe.yaml", "tensorboard"}
    assert "cross-entropy on the given responses" in found.stdout

    from transformers import AutoModelForCausalLM, AutoTokenizer

    exported = folder / "hf" / "step_000030"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    turns = [{"role": "user", "content": LINES[3]["prompt"]}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False, return_tensors="pt")
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8)
    assert tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True) == LINES[3]["response"]


def test_it_resumes_where_it_stopped(taught: World, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(taught, run={"steps": 6}, checkpoint={"every": 3, "export_at_end": False}, evaluation={"every": 3})
    straight, stopped = taught.run_folder("straight"), taught.run_folder("stopped")
    assert call(sft.main, [str(path), "--run.name", "straight"]) == 0
    shutil.copytree(straight, stopped)
    shutil.rmtree(stopped / "checkpoints" / "step_000006")
    (stopped / "checkpoints" / "latest").write_text("step_000003\n")
    (stopped / "summary.json").unlink()
    assert call(sft.main, [str(path), "--run.name", "stopped"]) == 0
    assert metrics(stopped) == metrics(straight)
    before, after = (json.loads((folder / "summary.json").read_text()) for folder in (straight, stopped))
    assert {**before, "name": ""} == {**after, "name": ""}

    # the other stage starts from the exported model instead
    checkpoint = str(straight / "checkpoints" / "step_000006")
    argv = [str(taught.recipe()), "--run.name", "refused", "--checkpoint.resume", checkpoint, "--run.steps", "9"]
    message = refusal(capsys, train.main, argv)
    assert "was made by `asd-megatron sft`" in message and "as model.path" in message


def test_seeds_of_64_bits() -> None:
    """Neighbours at both ends of the range give orders of their own; those below 2^63 stay as they were."""
    source = SupervisedFile(range(9), True)
    orders = {seed: tuple(source.batch(1, 9, seed)) for seed in (0, 1, 2**63 - 1, 2**63, 2**64 - 1)}
    assert len(set(orders.values())) == len(orders)
    assert all(sorted(order) == list(range(9)) for order in orders.values())
    assert orders[1] == (6, 8, 4, 0, 1, 7, 5, 2, 3)


def test_weights_of_tokens(taught: World) -> None:
    """A token of weight 0 is not learned from: its contradictions do no harm."""
    lines = [{"prompt": "w1", "response": f"w2 w{i}", "loss_weights": [1, 0, 2]} for i in range(10, 16)]
    write_lines(taught.folder / "weighted.jsonl", lines)
    weighted = {"train": str(taught.folder / "weighted.jsonl"), "test": None}
    path = recipe(taught, data=weighted, run={"steps": 12}, reward=None, evaluation=None, sampling=None)
    assert call(sft.main, [str(path), "--run.name", "weighted"]) == 0
    rows = read_metrics(taught.run_folder("weighted"))
    assert rows[-1]["sft/loss"] < 0.05  # ln 6 for the middle token, if it counted


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([LINES[0], {"prompt": "w1"}], ["given_wrong.jsonl:2: `response` is missing"]),
        ([{**LINES[0], "loss_weights": [1]}], ["given_wrong.jsonl:1: `loss_weights` has 1 entries", "3 tokens"]),
        ([{"prompt": "w1", "response": "w2 " * 130}], ["given_wrong.jsonl:1: ", "the model takes 128"]),
        ([], ["has no examples"]),
    ],
)
def test_given_responses_that_cannot_be_used(
    taught: World, capsys: pytest.CaptureFixture[str], lines: list[Any], words: list[str]
) -> None:
    wrong = write_lines(taught.folder / "given_wrong.jsonl", lines)
    message = refusal(capsys, sft.main, [str(recipe(taught)), "--run.name", "refused", "--data.train", str(wrong)])
    assert all(word in message for word in words), message
    assert not taught.run_folder("refused").exists()


# -------------------------------------------------------------------- the puzzle's warm start


def arithmetic(folder: Path, puzzles: int = 40) -> float:
    """Share of products (`=14` after `Wait 7`) that a folder's model gets right in searches of held-out puzzles."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    rng, right = random.Random(1), []
    for _ in range(puzzles):
        puzzle = draw_puzzle(rng, "test")
        words = unprivileged_trace(puzzle, 0.0, rng).words
        turns = [{"role": "user", "content": puzzle.question}]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        response = tokenizer.convert_tokens_to_ids(list(words))
        with torch.no_grad():
            guesses = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1].argmax(-1).tolist()
        right += [a == b for word, a, b in zip(words, guesses, response, strict=True) if word.startswith("=")]
    return sum(right) / len(right)


@pytest.mark.slow
def test_a_short_warm_start_learns(tmp_path: Path) -> None:
    """Fewer steps, smaller batches: a search that ends, and the first of the two tables of arithmetic."""
    model = write_initial_model(tmp_path / "model")
    settings = yaml.safe_load((Path(__file__).parents[2] / "examples" / "puzzle" / "warm_start.yaml").read_text())
    settings["run"] = {"name": "short", "folder": str(tmp_path / "{name}"), "steps": 180, "seed": 0}
    settings["model"] = {"path": str(model)}
    settings["sft"] = {"sequences_per_step": 32}
    settings["optimizer"]["warmup_steps"] = 10
    settings["evaluation"] = {"every": 120, "at_end": False, "problems": 50}  # step 120 ends the drill
    settings["logging"] = {"progress": False}
    settings["checkpoint"] = {}
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(settings))
    assert call(sft.main, [str(tmp_path / "short.yaml")]) == 0

    rows = read_metrics(tmp_path / "short")
    losses = [row["sft/loss"] for row in rows[1:]]
    assert losses[0] > 4 and sum(losses[-10:]) / 10 < 1.4
    before, after = rows[0], rows[120]
    assert before["evaluation/verified"] == 0 and after["evaluation/verified"] > 0.6
    assert before["evaluation/truncated"] > 0.3 and after["evaluation/truncated"] < 0.1
    assert arithmetic(model) < 0.1 and arithmetic(tmp_path / "short" / "hf" / "step_000180") > 0.7

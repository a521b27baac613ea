"""A training run of the puzzle as a user starts it: through the command, and through torchrun."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from asd_megatron.config import load_recipe
from asd_megatron.distributed.launch import torchrun_command
from asd_megatron.observe.names import undocumented
from asd_megatron.observe.writer import read_metrics
from asd_megatron.run.sources import WARM_START, model_folder
from tests.e2e.world import dump, metrics, responses, start

STEPS = 3
RECIPE = {
    "run": {"name": "puzzle", "folder": "runs/{name}", "steps": STEPS, "dump_rollouts": True},
    "model": {"path": WARM_START},
    "parallelism": {"tensor": 2},
    "gate": {"h_warm": 1e-3},
    "sampling": {
        "problems_per_step": 4,
        "rollouts_per_problem": 4,
        "max_prompt_tokens": 64,
        "max_response_tokens": 24,
    },
    "evaluation": {"every": 2, "problems": 10},
    "data": {"train": "puzzle:train", "test": "puzzle:test"},
    "reward": {"name": "puzzle"},
    "checkpoint": {"every": 1},
    "optimizer": {"learning_rate": 1e-3},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe, where the command was run."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    found = start("asd_megatron.cli.main", "train", "recipe.yaml", cwd=folder)
    assert found.returncode == 0, found.stderr
    (folder / "stdout").write_text(found.stdout)
    (folder / "stderr").write_text(found.stderr)
    return folder


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    return place / "runs" / "puzzle"


def test_the_folder(run: Path) -> None:
    """As the architecture page lays it out."""
    assert sorted(p.name for p in run.iterdir()) == [
        "checkpoints",
        "curves.png",
        "environment.json",
        "hf",
        "history.jsonl",
        "logs",
        "metrics.jsonl",
        "recipe.yaml",
        "rollouts",
        "summary.json",
        "tensorboard",
    ]
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["latest", "step_000002", "step_000003"]
    assert (run / "checkpoints" / "latest").read_text().strip() == "step_000003"
    assert [p.name for p in (run / "hf").iterdir()] == ["step_000003"]
    assert [p.name for p in sorted((run / "rollouts").iterdir())] == [f"step_00000{i}.parquet" for i in (1, 2, 3)]
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_resolved_recipe_is_the_recipe(place: Path, run: Path) -> None:
    recipe = load_recipe(place / "recipe.yaml")
    assert load_recipe(run / "recipe.yaml") == recipe
    written = yaml.safe_load((run / "recipe.yaml").read_text())
    assert written == recipe.model_dump(mode="json")  # every key
    assert len({e.info.recipe_hash for e in (dump(run, step) for step in (1, 2, 3))}) == 1


def test_environment_and_report(place: Path, run: Path) -> None:
    environment = json.loads((run / "environment.json").read_text())
    text = json.dumps(environment)
    assert torch.__version__ in text and "megatron" in text
    assert environment["layout"]["tensor"] == 2
    out = (place / "stdout").read_text()
    flat = " ".join(out.split())  # columns are as wide as their longest name
    for words in ("layout tp 2", "Supplied by", "condition antisd", "teacher scoring pass", "runs/puzzle"):
        assert words in flat
    assert out.count("Supplied by") == 1  # one rank speaks
    err = (place / "stderr").read_text()
    assert "step 3/3" in err and "held-out accuracy after 3 steps" in err
    assert "Traceback" not in err and "Warning" not in err


def test_metrics_are_documented_and_in_tensorboard(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = read_metrics(run)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert undocumented(name for row in rows for name in row) == []
    groups = {name.split("/")[0] for name in rows[2]} - {"step", "time_utc"}
    assert groups == {
        "advantage",
        "demonstration",
        "entropy",
        "evaluation",
        "gate",
        "loss",
        "mismatch",
        "optimizer",
        "perf",
        "pmi",
        "puzzle",
        "response",
        "reward",
        "rollouts",
        "term",
        "time",
        "tokens",
    }
    for row in rows[1:]:
        assert row["gate/lambda"] == 0.5 and row["optimizer/grad_norm"] > 0
        assert row["mismatch/max_abs"] < 1e-5
        assert row["rollouts/total"] == 16 and row["tokens/not_finite"] == 0
    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    shown = {(event.step, name): event.value for name in board.Tags()["scalars"] for event in board.Scalars(name)}
    written = {
        (row["step"], name): value
        for row in rows
        for name, value in row.items()
        if name not in ("step", "time_utc") and value is not None
    }
    assert shown.keys() == written.keys()
    assert all(abs(shown[key] - value) <= 1e-6 * max(1, abs(value)) for key, value in written.items())


def test_the_summary(run: Path) -> None:
    summary, rows = json.loads((run / "summary.json").read_text()), read_metrics(run)
    assert summary["accuracy_before"] == rows[0]["evaluation/accuracy"]
    assert summary["accuracy_after"] == rows[-1]["evaluation/accuracy"]
    assert summary["steps"] == STEPS and summary["condition"] == "antisd"
    assert summary["completed"] is True and summary["changed_settings"] == []


def test_transformers_loads_the_export(run: Path) -> None:
    """Model, tokenizer and chat template."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    exported = run / "hf" / "step_000003"
    model, info = AutoModelForCausalLM.from_pretrained(exported, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    before = AutoModelForCausalLM.from_pretrained(model_folder(WARM_START))
    assert all(not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    tokenizer = AutoTokenizer.from_pretrained(exported)
    example = dump(run, 3).examples[0].rollout
    question = tokenizer.decode(list(example.prompt_ids))
    assert "Target" in question and tokenizer.chat_template
    again = tokenizer.apply_chat_template([{"role": "user", "content": "Solve"}], add_generation_prompt=True)
    assert len(again["input_ids"] if hasattr(again, "keys") else again) > 1
    assert model.generation_config.eos_token_id == before.generation_config.eos_token_id


def test_a_dump_can_be_recomputed(run: Path) -> None:
    """Step 1's numbers from the folder that holds the weights before update 1."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder(WARM_START))
    found = dump(run, 1)
    for example, student, entropy, teacher in zip(
        found.examples,
        found.table.rows("student_logprobs"),
        found.table.rows("student_entropy"),
        found.table.rows("teacher_logprobs"),
        strict=True,
    ):
        response = list(example.rollout.response_ids)
        assert example.teacher_prompt_ids is not None
        for prompt, expected in ((example.rollout.prompt_ids, student), (example.teacher_prompt_ids, teacher)):
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
            logprobs = logits.log_softmax(-1)
            sampled = logprobs.gather(1, torch.tensor(response)[:, None])[:, 0]
            torch.testing.assert_close(expected, sampled, rtol=0, atol=1e-5)
            if prompt is example.rollout.prompt_ids:
                torch.testing.assert_close(entropy, -(logprobs.exp() * logprobs).sum(-1), rtol=0, atol=1e-5)


def test_torchrun_is_the_same_program(place: Path, run: Path) -> None:
    """And the run repeats exactly."""
    launcher = torchrun_command(2, "asd_megatron.train", ["recipe.yaml", "--run.name", "torchrun"])
    found = start(*launcher[2:], cwd=place)
    assert found.returncode == 0, found.stderr
    other = place / "runs" / "torchrun"
    assert metrics(other) == metrics(run)
    for step in (1, 2, 3):
        assert responses(other, step) == responses(run, step)
    assert sorted(p.name for p in other.iterdir()) == sorted(p.name for p in run.iterdir())

"""A mixture of experts through the complete program: the same run in every layout, resumed in another one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from asd_megatron import train
from tests.distributed.harness import run_ranks
from tests.e2e.test_layouts import _train, overrides
from tests.e2e.world import World, assert_close, make_world, metrics, refusal, responses, supervised, write_lines
from tests.models.tiny import tiny_qwen3_moe

LAYOUTS = {
    "ep2": {"data": 2, "expert": 2, "distributed_optimizer": True, "overlap_grad_reduce": True},
    "tp2_ep2": {"tensor": 2, "sequence_parallel": True, "expert": 2},
    "pp2": {"pipeline": 2},
}
RESUMED = "resumed_ep2"
STEPS = 3
RECIPE: dict[str, Any] = {
    "run": {"steps": STEPS, "dump_rollouts": True},
    "model": {"auxiliary_loss": 0.1},
    # Two updates a batch take the experts of the scoring pass before the first.
    "algorithm": {"name": "no_gate", "updates_per_batch": 2},
    "rollout": {"routing_replay": "scoring"},
    "checkpoint": {"every": 2, "export_at_end": True},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(tmp_path_factory.mktemp("experts"), layers=4, make=tiny_qwen3_moe)
    alone = world.train("alone", **RECIPE)
    recipe = str(world.recipe(**RECIPE))
    runs = [[recipe, *overrides(name, layout)] for name, layout in LAYOUTS.items()]
    resume = ["--checkpoint.resume", str(alone / "checkpoints" / "step_000002")]
    runs.append([recipe, *overrides(RESUMED, {"data": 2, "expert": 2}), *resume])
    assert run_ranks(_train, 2, runs, timeout=200) == [[0] * len(runs)] * 2
    return world


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_run(world: World, layout: str) -> None:
    alone, found = world.run_folder("alone"), world.run_folder(layout)
    for step in range(1, STEPS + 1):
        assert responses(found, step) == responses(alone, step)
    assert_close(metrics(found), metrics(alone), 1e-4)
    assert _load(found) == _load(alone)


def test_resumed_in_another_layout(world: World) -> None:
    """The load of the update before comes from the checkpoint."""
    alone, found = world.run_folder("alone"), world.run_folder(RESUMED)
    assert_close(metrics(found), metrics(alone)[STEPS - 1 :], 1e-4)
    assert _load(found) == _load(alone)[STEPS - 1 :]


@pytest.mark.parametrize("layout", [*LAYOUTS, RESUMED])
def test_exports(world: World, layout: str) -> None:
    name = Path("hf") / "step_000003" / "model.safetensors"
    start, expected, trained = (
        load_file(f)
        for f in (world.model / name.name, world.run_folder("alone") / name, world.run_folder(layout) / name)
    )
    assert trained.keys() == expected.keys() == start.keys()
    for tensor_name, tensor in expected.items():
        torch.testing.assert_close(trained[tensor_name], tensor, rtol=1e-4, atol=3e-5)
    assert not torch.equal(trained["model.layers.3.mlp.gate.weight"], start["model.layers.3.mlp.gate.weight"])


def test_metrics(world: World) -> None:
    rows = metrics(world.run_folder("alone"))
    assert all(0 < row["experts/entropy"] <= 1 for row in rows)
    assert all(f"experts/busiest_{layer:02d}" in rows[0] for layer in range(4))
    tokens = torch.tensor([row["tokens"] for row in _load(world.run_folder("alone"))])
    assert tokens.shape == (STEPS, 4, 6)
    assert tokens.sum(2).tolist() == [[2 * int(row["tokens/response"])] * 4 for row in rows]  # two experts a token


def test_the_auxiliary_loss_balances_the_load(world: World) -> None:
    """In the supervised stage, whose loss is the same for any load."""
    lines = [{"prompt": f"w{i} w{(5 * i) % 7}", "response": f"w{i + 20} w{(3 * i) % 11}"} for i in range(8)]
    given = write_lines(world.folder / "given.jsonl", lines)
    recipe = world.folder / "sft.yaml"
    sections = {
        "run": {"folder": str(world.folder / "runs" / "{name}"), "steps": 15},
        "model": {"path": str(world.model)},
        "sft": {"sequences_per_step": 6},
        "data": {"train": str(given)},
        "optimizer": {"learning_rate": 1e-2, "weight_decay": 0.0},
        "checkpoint": {"every": 0, "export_at_end": False},
        "logging": {"curves": False, "tensorboard": False},
    }
    recipe.write_text(yaml.safe_dump(sections))
    balanced, free = (
        metrics(supervised(world, f"auxiliary_{x}", recipe, "--model.auxiliary_loss", x))[-1] for x in ("1.0", "0")
    )
    assert balanced["experts/entropy"] > free["experts/entropy"] + 0.02
    assert balanced["experts/auxiliary_loss"] < free["experts/auxiliary_loss"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--parallelism.expert", "4", "--parallelism.data", "4"], "parallelism.expert 4 does not divide"),
        (["--algorithm.updates_per_batch", "1"], "rollout.routing_replay scoring"),
        (["--rollout.routing_replay", "engine"], "rollout.engine sglang"),
    ],
)
def test_refusals(world: World, changes: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(capsys, train.main, [str(world.recipe(**RECIPE)), "--run.name", "refused", *changes])
    assert words in message


def _load(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "expert_load.jsonl").read_text().splitlines()]

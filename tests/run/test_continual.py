"""Continual training: what a new run takes from another run's checkpoint, what begins anew, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from asd_megatron import train
from asd_megatron.checkpoint import training
from asd_megatron.checkpoint.distcp import DistributedCheckpoint
from asd_megatron.checkpoint.optimizer_state import step_count
from asd_megatron.config import load_recipe, recipe_hash
from asd_megatron.models.port import ModelPort
from asd_megatron.observe.writer import read_metrics
from asd_megatron.run.continual import Origin, load_origin
from asd_megatron.run.history import read_history
from asd_megatron.run.preview import preview, start_text
from asd_megatron.run.rl import TrainingRun
from asd_megatron.run.session import open_session
from asd_megatron.trainer.optimizer import Optimizer
from tests.checkpoint.trainer import CONFIG, Trainer, weights
from tests.distributed.harness import run_ranks
from tests.e2e.world import call, without_torchrun
from tests.models import everywhere
from tests.puzzle_recipe import write_recipe


def recipe_file(folder: Path, name: str, condition: str, **sections: dict[str, Any]) -> str:
    recipe: dict[str, dict[str, Any]] = {
        "run": {"name": name, "folder": str(folder / "{name}"), "steps": 4, "seed": 3},
        "algorithm": {"name": condition},
        "optimizer": {"learning_rate": 1e-4, "schedule": "linear", "warmup_steps": 2},
        "checkpoint": {"every": 2},
    }
    for section, keys in sections.items():
        recipe.setdefault(section, {}).update(keys)
    return str(write_recipe(folder / f"{name}.yaml", **recipe))


@pytest.fixture(scope="module")
def grpo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run `grpo` of four steps, whose checkpoint is step_000004."""
    folder = tmp_path_factory.mktemp("continual")
    assert call(train.main, [recipe_file(folder, "grpo", "grpo")]) == 0
    return folder


def antisd(grpo: Path, name: str, **sections: dict[str, Any]) -> str:
    checkpoint = {"continual_from": str(grpo / "grpo"), **sections.pop("checkpoint", {})}
    sections = {"gate": {"warmup_steps": 2}, "teacher": {"weights": "ema"}, **sections}
    return recipe_file(grpo, name, "antisd", checkpoint=checkpoint, **sections)


def _equal(port: ModelPort, optimizer: Optimizer, stored: DistributedCheckpoint) -> set[str]:
    """The stored tensors of which this rank's weights, moments and master weights are bit for bit a part."""
    equal, differing = set(), set()
    for part in training._parts(port, optimizer.megatron, None, ()):
        for box in part.boxes:
            values = torch.empty(box.sizes, dtype=stored.tensors[box.key].dtype)
            stored.read_box(box.key, box.offsets, box.sizes, values)
            (equal if torch.equal(values, box.of(part.values())) else differing).add(box.key)
    return equal - differing


def test_what_is_kept_and_what_begins(grpo: Path) -> None:
    """Weights, moments and Adam's step count of the checkpoint; the schedule, the gate and the average from here."""
    recipe = load_recipe(antisd(grpo, "begins"))
    stored = DistributedCheckpoint(grpo / "grpo" / "checkpoints" / "step_000004")
    with without_torchrun(), open_session(recipe) as session:
        run = TrainingRun(recipe, session)
        assert _equal(session.port, session.optimizer, stored) == stored.tensors.keys()
        assert step_count(session.optimizer.megatron) == 4
        assert session.first_step == 1 and session.resumed is None
        assert session.optimizer.learning_rate == pytest.approx(0.5e-4)  # half of the warm-up
        assert run.strength.warm_up == 2 and run.strength.gate.h_warm is None
        assert session.copies is not None
        average, live = session.copies.of_parameters("ema"), session.port.named_weights()
        assert all(torch.equal(a, w) for a, (_, w) in zip(average.values(), live, strict=True))


def test_a_run_and_its_own_resumption(grpo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = antisd(grpo, "own", run={"steps": 4})
    dry = start_text(load_recipe(recipe), preview(load_recipe(recipe), "train"))
    assert "from the weights and moments of" in dry and "step 4 of the run grpo" in dry
    assert call(train.main, [recipe, "--run.steps", "2"]) == 0
    assert "continual from" in capsys.readouterr().out
    begun = read_history(grpo / "own")[0]
    source = load_recipe(str(grpo / "grpo.yaml"))
    assert begun["event"] == "fresh" and begun["step"] == 0 and begun["checkpoint"] is None
    assert begun["continual_from"] == {
        "checkpoint": str(grpo / "grpo" / "checkpoints" / "step_000004"),
        "step": 4,
        "run": "grpo",
        "recipe_hash": recipe_hash(source),
    }
    (grpo / "grpo" / "checkpoints").rename(grpo / "moved")  # not read any more
    try:
        assert call(train.main, [recipe]) == 0
    finally:
        (grpo / "moved").rename(grpo / "grpo" / "checkpoints")
    assert "step 4 of the run grpo" in capsys.readouterr().out
    rows = read_metrics(grpo / "own")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["gate/warming_up"] for row in rows] == [1, 1, 0, 0]
    assert [row["gate/lambda"] for row in rows][:2] == [0, 0]
    straight = antisd(grpo, "straight")
    assert call(train.main, [straight]) == 0
    for name in ("optimizer/grad_norm", "entropy/student_mean", "gate/h_warm"):
        assert [row[name] for row in rows[2:]] == [row[name] for row in read_metrics(grpo / "straight")[2:]]


def test_refusals(grpo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(recipe: str, *overrides: str) -> str:
        assert call(train.main, [recipe, *overrides]) == 2
        return capsys.readouterr().err

    key = "--checkpoint.continual_from"
    checkpoint = str(grpo / "grpo" / "checkpoints" / "step_000004")
    recipe = antisd(grpo, "refused")
    assert "would both be loaded" in refused(recipe, "--checkpoint.resume", checkpoint)
    assert f"checkpoint.continual_from: {grpo / 'none'} is no folder" in refused(recipe, key, str(grpo / "none"))
    assert "set it so here too" in refused(recipe, "--parallelism.distributed_optimizer", "true")
    assert "are float32, and bfloat16 in this run" in refused(recipe, "--model.dtype", "bfloat16")
    damaged = grpo / "copy" / "checkpoints" / "step_000004"
    shutil.copytree(checkpoint, damaged)
    content = bytearray((damaged / "__0_0.distcp").read_bytes())
    content[len(content) // 2] ^= 1
    (damaged / "__0_0.distcp").write_bytes(content)
    told = refused(recipe, key, str(damaged))
    assert f"checkpoint.continual_from: the checkpoint {damaged} is damaged: " in told and "copy it again" in told
    own = [recipe_file(grpo, "grpo", "grpo"), key, checkpoint]
    assert "checkpoint.continual_from: null -> " in refused(*own)
    overwriting = ["--run.overwrite", "true", "--checkpoint.resume", "never"]
    assert "run.overwrite would remove" in refused(*own, *overwriting)
    assert not (grpo / "refused").exists()
    run_state = Path(checkpoint) / "run_state.json"
    text = run_state.read_text()
    run_state.write_text(json.dumps({**json.loads(text), "run_state": {"stage": "sft", "step": 4}}))
    try:
        assert "moments are those of another loss" in refused(recipe)
    finally:
        run_state.write_text(text)
    data = Path(checkpoint) / "__0_0.distcp"
    content = data.read_bytes()
    data.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        found = refused(recipe)
    finally:
        data.write_bytes(content)
    assert "is damaged" in found and f"or give {grpo / 'grpo' / 'checkpoints' / 'step_000002'}" in found
    other = grpo / "other_model"
    shutil.copytree(Path(train.__file__).parent / "puzzle" / "warm_start", other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(
        json.dumps({**config, "rms_norm_eps": 0.5, "eos_token_id": [1], "use_cache": False})
    )
    assert "is of another model" in (said := refused(recipe, "--model.path", str(other))) and "rms_norm_eps" in said
    assert "eos_token_id" not in said and "use_cache" not in said


def _move(rank: int, folder: str) -> tuple[bool, int, float]:
    """A checkpoint of tensor parallelism 2, continued under pipeline parallelism 2: whether weights and moments are
    equal, Adam's step count, the first learning rate."""
    from asd_megatron.distributed.layout import Layout, init

    before = Trainer({"tensor": 2}, False, seed=1)
    before.steps(range(3))
    path = before.save(Path(folder), 3)
    expected = before.weights()
    sizes = Layout(pipeline=2)
    port = ModelPort.build(CONFIG, init(sizes), sizes, dtype=torch.float32)
    port.load(weights(port.expected(), 2))
    port.wrap_ddp(distributed_optimizer=False, overlap_grad_reduce=False)
    schedule: dict[str, Any] = {"schedule": "cosine", "warmup_steps": 4, "total_steps": 9, "min_learning_rate": 0.0}
    adam: dict[str, Any] = {"weight_decay": 0.1, "beta1": 0.9, "beta2": 0.99, "epsilon": 1e-8, "clip_grad": 1.0}
    optimizer = Optimizer(port, learning_rate=4e-2, distributed=False, **schedule, **adam)
    load_origin(Origin(str(path), 3), port, optimizer, None, None)
    found = everywhere.weights(port)
    equal = all(torch.equal(found[name], tensor) for name, tensor in expected.items()) and len(found) == len(expected)
    keys = _equal(port, optimizer, stored := DistributedCheckpoint(path))
    everyone = [set[str]() for _ in range(2)]
    dist.all_gather_object(everyone, keys)
    equal &= everyone[0] | everyone[1] == stored.tensors.keys()
    return equal, step_count(optimizer.megatron), optimizer.learning_rate


def test_another_layout(tmp_path: Path) -> None:
    for equal, count, rate in run_ranks(_move, 2, str(tmp_path)):
        assert equal and count == 3 and math.isclose(rate, 1e-2)

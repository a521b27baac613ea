"""What a run on one GPU must share with the same run on the CPU (docs/gpu_checks.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from asd_megatron.observe.writer import read_metrics
from tests.e2e.world import World, assert_close, dump, make_gpu_world, metrics, start

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
ELSEWHERE = "mismatch/"  # the recorded sampler's distance from this trainer


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_gpu_world(tmp_path_factory.mktemp("cuda"))


def trained(world: World, name: str, *overrides: str, **environment: str) -> Path:
    recipe = world.recipe(file=f"{name}.yaml", run={"dump_rollouts": True})
    done = start("asd_megatron.train", str(recipe), "--run.name", name, *overrides, cwd=world.folder, **environment)
    assert done.returncode == 0, done.stderr[-5000:]
    return world.run_folder(name)


@pytest.fixture(scope="module")
def recorded(world: World) -> Path:
    """Two steps on the CPU in float32."""
    return trained(world, "recorded", "--model.dtype", "float32", **NO_GPU)


def replayed(world: World, recorded: Path, name: str, *overrides: str) -> Path:
    return trained(world, name, "--rollout.engine", "replay", "--rollout.replay_folder", str(recorded), *overrides)


def common(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.startswith(ELSEWHERE)} for row in metrics(folder)]


def test_float32_trains_as_on_the_cpu(world: World, recorded: Path) -> None:
    """The same rollouts: scores, loss, gradient norm of both steps, the second after an update."""
    folder = replayed(world, recorded, "float32", "--model.dtype", "float32")
    assert_close(common(folder), common(recorded), 1e-3)
    for step in (1, 2):
        ours, theirs = dump(folder, step).table.columns, dump(recorded, step).table.columns
        for name in ("student_logprobs", "teacher_logprobs", "pmi", "advantage"):
            torch.testing.assert_close(ours[name], theirs[name], atol=1e-4, rtol=1e-3)


def test_copies_of_weights_are_exchanged_as_on_the_cpu(world: World) -> None:
    """Pinned host memory: a moving average as the teacher, and the initial weights for a KL penalty."""
    copies = ["--teacher.weights", "ema", "--teacher.ema_rate", "0.5", "--algorithm.kl_coefficient", "0.1"]
    expected = trained(world, "copies_recorded", "--model.dtype", "float32", *copies, **NO_GPU)
    folder = replayed(world, expected, "copies", "--model.dtype", "float32", *copies)
    assert_close(common(folder), common(expected), 1e-3)
    assert metrics(folder)[1]["kl/k2"] > 0


def test_bfloat16_stays_near_float32(world: World, recorded: Path) -> None:
    folder = replayed(world, recorded, "bfloat16", "--model.dtype", "bfloat16")
    ours, theirs = dump(folder, 1).table.columns, dump(recorded, 1).table.columns
    for name in ("student_logprobs", "teacher_logprobs"):
        assert (ours[name] - theirs[name]).abs().mean() < 0.05


def test_sampling_agrees_with_scoring(world: World) -> None:
    """The embedded engine on the GPU, in bfloat16; and the model that it trained is left behind."""
    folder = trained(world, "sampled", "--checkpoint.export_at_end", "true")
    rows = [row for row in read_metrics(folder) if row["step"] > 0]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["mismatch/mean_abs"] < 0.05 and row["optimizer/skipped"] == 0 for row in rows)
    assert list(folder.glob("hf/*/*.safetensors"))


def test_a_deterministic_run_repeats_its_bits(world: World) -> None:
    """Two runs that sample, score and train on the GPU: equal responses, log-probs and updates."""
    first, again = (trained(world, name, "--run.deterministic", "true") for name in ("deterministic", "repeated"))
    for step in (1, 2):
        ours, theirs = dump(first, step), dump(again, step)
        assert ours.examples == theirs.examples
        for name, column in ours.table.columns.items():
            assert torch.equal(column, theirs.table.columns[name]) or column.isnan().any(), name

"""What only GPUs can run of training with SGLang servers (docs/gpu_checks.md): NCCL, CUDA IPC, memory given back."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from asd_megatron.observe.writer import read_metrics
from asd_megatron.run.mismatch import LARGE_KL
from tests.e2e.world import World, make_fp8_world, make_gpu_world, start
from tests.rollout.sglang.sglang_world import sglang_python

pytestmark = [pytest.mark.gpu, pytest.mark.sglang]
STEPS = 4


def devices() -> list[str]:
    """The visible GPUs as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return named.split(",") if named else [str(index) for index in range(torch.cuda.device_count())]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_gpu_world(tmp_path_factory.mktemp("gpu"))


def trained(world: World, name: str, rollout: dict[str, Any], **sections: Any) -> list[dict[str, Any]]:
    recipe = world.recipe(
        file=f"{name}.yaml",
        run={"folder": str(world.folder / "runs" / "{name}"), "name": name, "steps": STEPS},
        rollout={"engine": "sglang", "server_python": str(sglang_python()), "server_start_timeout": 600.0, **rollout},
        **sections,
    )
    done = start("asd_megatron.cli.main", "train", str(recipe), cwd=world.folder, timeout=1200)
    assert done.returncode == 0, done.stderr[-5000:]
    return [row for row in read_metrics(Path(world.run_folder(name))) if row["step"] > 0]


def check(rows: list[dict[str, Any]]) -> None:
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(row["weight_sync/verified"] == 1 and row["weight_sync/probe_exceeded"] == 0 for row in rows)
    assert all(row["mismatch/mean_abs"] < 0.05 for row in rows), "bfloat16 on both sides"


@pytest.mark.timeout(1800)
def test_colocated_servers_give_their_memory_to_the_trainer(world: World) -> None:
    rollout = {
        "placement": "colocated",
        "offload_optimizer": True,
        "weight_sync": "cuda_ipc",
        "server_args": {"mem-fraction-static": 0.3},
    }
    check(trained(world, "colocated", rollout))


@pytest.mark.timeout(1800)
def test_servers_on_other_devices_are_sent_weights_over_nccl(world: World) -> None:
    if len(devices()) < 2:
        pytest.skip("needs two GPUs: one for the trainer, one for the server")
    check(
        trained(world, "disaggregated", {"server_devices": devices()[1:2], "server_args": {"mem-fraction-static": 0.3}})
    )


@pytest.mark.timeout(1800)
def test_weights_through_a_folder(world: World) -> None:
    rollout = {"placement": "colocated", "weight_sync": "disk", "server_args": {"mem-fraction-static": 0.3}}
    check(trained(world, "disk", rollout))


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("weight_sync", ["cuda_ipc", "disk"])
def test_a_quantised_server(weight_sync: str, tmp_path: Path) -> None:
    """FP8 weights arrive (checksums), are computed with (the probe), and the rollouts are corrected by default."""
    rollout = {
        "placement": "colocated",
        "quantization": "fp8",
        "weight_sync": weight_sync,
        "server_args": {"mem-fraction-static": 0.3},
    }
    fp8 = make_fp8_world(tmp_path)
    rows = trained(fp8, f"fp8_{weight_sync}", rollout, model={"path": str(fp8.model), "dtype": "bfloat16"})
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row in rows:
        assert row["weight_sync/verified"] == 1 and row["weight_sync/probe_exceeded"] == 0
        assert row["weight_sync/probe_mean_abs"] > 0.001, "bfloat16 would be closer"
        assert row["mismatch/k3"] < LARGE_KL and 0.9 < row["importance/mean"] < 1.1
    said = (fp8.run_folder(f"fp8_{weight_sync}") / "recipe.yaml").read_text()
    assert "importance_correction: truncated" in said

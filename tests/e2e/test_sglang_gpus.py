"""Training with SGLang servers on several GPUs over NCCL, and with a colocated server that evaluates; see
docs/gpu_checks.md. Their recipes are read on the CPU too."""

from __future__ import annotations

from typing import Any

import pytest

from asd_megatron.cli.placement import place
from asd_megatron.config import load_recipe
from tests.e2e.test_sglang_gpu import check, devices, trained
from tests.e2e.world import World, make_gpu_world

MEMORY = {"mem-fraction-static": 0.3}
TRAINER = {"tensor": 2, "data": 1, "sequence_parallel": True}
SERVERS = {"2x1": (2, 1), "1x2": (1, 2), "2x2": (2, 2)}
"""By test: how many servers, and the tensor-parallel size of each."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_gpu_world(tmp_path_factory.mktemp("gpus"))


def nccl(name: str, gpus: list[str]) -> dict[str, Any]:
    """The section `rollout`, with the servers on the GPUs after the trainer's."""
    count, tensor = SERVERS[name]
    of_server = (gpus[2 + tensor * number : 2 + tensor * (number + 1)] for number in range(count))
    return {
        "servers": count,
        "server_tensor_parallel": tensor,
        "server_devices": [",".join(names) for names in of_server],
        "server_args": MEMORY,
    }


def colocated(world: World) -> dict[str, Any]:
    """Sections of a run that evaluates before, between and after its steps."""
    return {
        "rollout": {"placement": "colocated", "weight_sync": "cuda_ipc", "server_args": MEMORY},
        "data": {"train": str(world.problems), "test": str(world.problems)},
        "evaluation": {"every": 1, "problems": 4},
    }


@pytest.mark.gpu
@pytest.mark.sglang
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", SERVERS)
def test_weights_over_nccl(world: World, name: str) -> None:
    """The trainer's shards are gathered on one rank, and a server's ranks cut theirs from what arrives."""
    count, tensor = SERVERS[name]
    if len(devices()) < 2 + count * tensor:
        pytest.skip(f"needs {2 + count * tensor} GPUs: two for the trainer, {tensor} for each server")
    rows = trained(world, f"nccl_{name}", nccl(name, devices()), parallelism=TRAINER)
    check(rows)
    assert all(row["servers/serving"] == count for row in rows)


@pytest.mark.gpu
@pytest.mark.sglang
@pytest.mark.timeout(1800)
def test_a_colocated_server_evaluates(world: World) -> None:
    """An evaluation and the next step use the same weights, with a release of the server's memory between them."""
    sections = colocated(world)
    rows = trained(world, "evaluating", sections.pop("rollout"), **sections)
    check(rows)
    assert all("evaluation/accuracy" in row for row in rows)


def on_each_gpu(gpus: list[str]) -> dict[str, Any]:
    """The section `rollout` with a colocated server on each of the trainer's two GPUs."""
    return {"placement": "colocated", "weight_sync": "cuda_ipc", "server_args": MEMORY} | {
        "servers": 2,
        "server_devices": gpus[:2],
    }


@pytest.mark.gpu
@pytest.mark.sglang
@pytest.mark.timeout(1800)
def test_a_colocated_server_on_each_gpu(world: World) -> None:
    """Each server maps the memory of the trainer's rank on its own GPU."""
    if len(devices()) < 2:
        pytest.skip("needs 2 GPUs")
    rows = trained(world, "on_each", on_each_gpu(devices()), parallelism=TRAINER)
    check(rows)
    assert all(row["servers/serving"] == 2 for row in rows)


def test_the_recipes_are_accepted(world: World) -> None:
    for name, (count, tensor) in SERVERS.items():
        gpus = [str(number) for number in range(2 + count * tensor)]
        rollout = {"engine": "sglang", "server_python": "python", **nccl(name, gpus)}
        placement = place(load_recipe(world.recipe(rollout=rollout, parallelism=TRAINER)), len(gpus), {})
        assert placement.devices == ("0", "1") and placement.servers == tuple(gpus[2:]) and not placement.unused
    rollout = {"engine": "sglang", "server_python": "python", **on_each_gpu(["0", "1"])}
    assert place(load_recipe(world.recipe(rollout=rollout, parallelism=TRAINER)), 2, {}).devices == ("0", "1")
    sections = colocated(world)
    sections["rollout"] |= {"engine": "sglang", "server_python": "python"}
    recipe = load_recipe(world.recipe(**sections))
    assert recipe.evaluation.at_start and place(recipe, 1, {}).devices == ("0",)

"""The same run in every layout of two ranks: same samples, same numbers, same weights at the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import distributed_c10d as c10d

from asd_megatron.distributed import objects
from asd_megatron.distributed.layout import ProcessGroups
from asd_megatron.run import ranks
from tests.distributed.harness import run_ranks
from tests.e2e.world import World, assert_close, make_world, metrics, responses

STEPS = 3
SAMPLED = {
    "dp2": {"data": 2},
    "dp2_distopt": {"data": 2, "distributed_optimizer": True, "overlap_grad_reduce": True},
    "pp2": {"pipeline": 2},
    "tp2_sp": {"tensor": 2, "sequence_parallel": True},
}
REPLAYED = {"pp2_vpp2": {"pipeline": 2, "virtual_pipeline": 2}, "cp2": {"context": 2}}
RESUMED = "resumed_tp2"


def overrides(name: str, parallelism: dict[str, Any]) -> list[str]:
    keys = [f"--parallelism.{key}={str(value).lower()}" for key, value in parallelism.items()]
    return ["--run.name", name, *keys]


@pytest.fixture(scope="module")
def four_layers(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(tmp_path_factory.mktemp("layouts"), layers=4)
    recipe = {
        "run": {"steps": STEPS, "dump_rollouts": True},
        "data": {"test": str(world.problems)},
        "evaluation": {"every": 2, "problems": 4},
        "checkpoint": {"every": 2, "export_at_end": True},
    }
    alone = world.train("alone", **recipe)
    replay = {"engine": "replay", "replay_folder": str(alone)}
    rollouts = [[str(world.recipe(**recipe)), *overrides(name, layout)] for name, layout in SAMPLED.items()]
    resume = ["--checkpoint.resume", str(world.run_folder("dp2_distopt") / "checkpoints" / "step_000002")]
    rollouts.append([rollouts[0][0], *overrides(RESUMED, {"tensor": 2, "distributed_optimizer": True}), *resume])
    dumps = world.recipe("replay.yaml", **{**recipe, "rollout": replay, "data": {}, "evaluation": {"every": 0}})
    replays = [[str(dumps), *overrides(name, layout)] for name, layout in REPLAYED.items()]
    assert run_ranks(_train, 2, [*rollouts, *replays], timeout=200) == [[0] * (len(rollouts) + len(replays))] * 2
    return world


@contextmanager
def objects_on_the_host_group() -> Iterator[None]:
    """Inside, the host group is one of its own, as on GPUs, and a Python object that travels over another group is an
    error, also one of Megatron-Core's or PyTorch's checkpoints."""
    joined: list[ProcessGroups] = []
    init, pickled = ranks.layouts.init, c10d._object_to_tensor

    def recorded(*args: Any, **kwargs: Any) -> ProcessGroups:
        joined.append(init(*args, **kwargs))
        assert joined[-1].host is not joined[-1].world
        return joined[-1]

    def check(group: Any) -> None:
        assert group is joined[-1].host, f"an object over {c10d._get_pg_name(group) if group else 'the world'}"

    def checked(obj: Any, device: Any, group: Any) -> Any:
        check(group)
        return pickled(obj, device, group)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks.device, "backend", lambda: "cpu:gloo")
        patch.setattr(ranks.layouts, "init", recorded)
        patch.setattr(c10d, "_object_to_tensor", checked)
        patch.setattr(objects, "_check", check)
        yield
    assert joined


def _train(rank: int, runs: list[list[str]]) -> list[int]:
    from asd_megatron import train

    with objects_on_the_host_group():
        return [train.main(argv) for argv in runs]


@pytest.mark.parametrize("layout", SAMPLED)
def test_sampled(four_layers: World, layout: str) -> None:
    alone, found = four_layers.run_folder("alone"), four_layers.run_folder(layout)
    assert [row["step"] for row in metrics(found)] == [0, 1, 2, 3]
    for step in range(1, STEPS + 1):
        assert responses(found, step) == responses(alone, step)
    assert_close(metrics(found), metrics(alone), 1e-4)


@pytest.mark.parametrize("layout", REPLAYED)
def test_replayed(four_layers: World, layout: str) -> None:
    """Layouts that cannot sample train from dumps."""
    alone = metrics(four_layers.run_folder("alone"))[1:]
    trained = [{k: v for k, v in row.items() if not k.startswith("evaluation/")} for row in alone]
    assert_close(metrics(four_layers.run_folder(layout)), trained, 1e-4)


def test_resumed_in_another_layout(four_layers: World) -> None:
    """From a checkpoint of two data-parallel ranks."""
    alone, found = metrics(four_layers.run_folder("alone"))[3:], metrics(four_layers.run_folder(RESUMED))
    assert_close(found, alone, 1e-4)
    assert abs(found[0]["loss/policy"] - alone[0]["loss/policy"]) < 1e-5


@pytest.mark.parametrize("layout", [*SAMPLED, *REPLAYED, RESUMED])
def test_exports(four_layers: World, layout: str) -> None:
    names = [Path("hf") / "step_000003" / "model.safetensors", Path("hf") / "step_000003" / "config.json"]
    alone, found = four_layers.run_folder("alone"), four_layers.run_folder(layout)
    start, expected, trained = (
        load_file(f) for f in (four_layers.model / names[0].name, alone / names[0], found / names[0])
    )
    assert trained.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(trained[name], tensor, rtol=1e-4, atol=3e-5)
        assert not torch.equal(trained[name], start[name])
    assert (found / names[1]).read_text() == (alone / names[1]).read_text()

"""A run repeats exactly, and what only looks on changes nothing. (Layouts: test_layouts.py.)"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.world import World, dump, metrics, responses

OPTIONS: dict[str, dict[str, Any]] = {
    "run": {"dump_rollouts": True, "steps": 3},
    "algorithm": {"name": "antisd"},
    "gate": {"warmup_steps": 1},
}


@pytest.fixture(scope="module")
def once(world: World) -> Path:
    return world.train("once", **OPTIONS)


def test_the_same_run_twice(world: World, once: Path) -> None:
    twice = world.train("twice", **OPTIONS)
    assert metrics(once) == metrics(twice)
    for step in (1, 2, 3):
        assert responses(once, step) == responses(twice, step)
        one, other = dump(once, step), dump(twice, step)
        assert {k: v.tolist() for k, v in one.table.columns.items()} == {
            k: v.tolist() for k, v in other.table.columns.items()
        }


def test_another_seed(world: World, once: Path) -> None:
    other = world.train("seed", "--run.seed", "2", **OPTIONS)
    assert responses(other, 1) != responses(once, 1)


def test_evaluating_and_sampling_in_other_batches_change_nothing(world: World, once: Path) -> None:
    evaluation = {"data": {"test": str(world.problems)}, "evaluation": {"every": 1, "samples": 2, "top_p": 0.9}}
    watched = world.train("watched", "--rollout.max_batch_size", "5", **OPTIONS, **evaluation)
    rows = [{k: v for k, v in row.items() if not k.startswith("evaluation/")} for row in metrics(watched)]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    for step in (1, 2, 3):
        assert responses(watched, step) == responses(once, step)
    for row, expected in zip(rows[1:], metrics(once), strict=True):
        assert {k: v for k, v in row.items() if not k.startswith("mismatch/")} == {
            k: v for k, v in expected.items() if not k.startswith("mismatch/")
        }

"""A run repeats exactly."""

from __future__ import annotations

from tests.e2e.world import World, dump, metrics, responses


def test_the_same_run_twice(world: World) -> None:
    options = {"run": {"dump_rollouts": True, "steps": 3}, "algorithm": {"name": "antisd"}, "gate": {"warmup_steps": 1}}
    first, second = (world.train(name, **options) for name in ("once", "twice"))
    assert metrics(first) == metrics(second)
    for step in (1, 2, 3):
        assert responses(first, step) == responses(second, step)
        one, other = dump(first, step), dump(second, step)
        assert {k: v.tolist() for k, v in one.table.columns.items()} == {
            k: v.tolist() for k, v in other.table.columns.items()
        }

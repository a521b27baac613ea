"""Runs with dynamic sampling and the other options of policy gradients, end to end."""

from __future__ import annotations

import shutil
from typing import Any

import pytest

from asd_megatron.observe.names import undocumented
from tests.e2e.world import World, dump, metrics, responses

OPTIONS: dict[str, dict[str, Any]] = {
    "run": {"steps": 4, "dump_rollouts": True},
    "algorithm": {
        "name": "no_gate",
        "group_advantage": "leave_one_out",
        "whiten_advantages": True,
        "overlong_buffer": 4,
        "policy_loss": "gspo",
        "clip_low": 3e-4,
        "clip_high": 4e-4,
        "aggregation": "sequence_mean",
        "updates_per_batch": 2,
        "entropy_coefficient": 0.01,
    },
    "sampling": {
        "problems_per_step": 2,
        "rollouts_per_problem": 2,  # half of the groups have equal rewards
        "redraw": "equal_rewards",
        "redraw_limit": 5,
    },
    "checkpoint": {"every": 2},
}


def test_straight_and_interrupted(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    """The same run, killed after the checkpoint of step 2, draws the same problems in place of others."""
    straight = world.train("redraw_straight", **OPTIONS)
    told = capsys.readouterr().out
    assert "groups with equal rewards are discarded for others, at most 5 a step" in told and "two-phase head" in told
    stopped = world.run_folder("redraw_stopped")
    shutil.copytree(straight, stopped)
    shutil.rmtree(stopped / "checkpoints" / "step_000004")
    (stopped / "checkpoints" / "latest").write_text("step_000002\n")
    lines = (stopped / "metrics.jsonl").read_text().splitlines(keepends=True)
    (stopped / "metrics.jsonl").write_text("".join(lines[:3]))
    (stopped / "summary.json").unlink()
    resumed = world.train("redraw_stopped", **OPTIONS)
    assert metrics(straight) == metrics(resumed)
    rows = metrics(straight)
    assert sum(row["rollouts/rejected_groups"] for row in rows) > 0
    assert undocumented(name for row in rows for name in row) == []
    drawn = []
    for row in rows:
        step = row["step"]
        assert responses(straight, step) == responses(resumed, step)
        groups: dict[str, list[float]] = {}
        for e in dump(straight, step).examples:
            groups.setdefault(e.rollout.prompt_id, []).append(e.reward)
        assert len(groups) == 2 - row["rollouts/short_groups"]
        assert all(min(rewards) < max(rewards) for rewards in groups.values())
        drawn += groups
    assert len(set(drawn)) > 4


def test_antisd_keeps_groups_on_which_its_term_acts(world: World) -> None:
    """`no_signal` with the data's solutions: every response has a context, and no group is discarded; without a term
    those with equal rewards are."""
    sampling = {**OPTIONS["sampling"], "redraw": "no_signal"}
    rejected = {}
    for name in ("no_gate", "grpo"):
        folder = world.train(f"signal_{name}", run={"steps": 2}, algorithm={"name": name}, sampling=sampling)
        rows = metrics(folder)
        rejected[name] = sum(row["rollouts/rejected_groups"] for row in rows)
        assert all((row["reward/mixed_groups"] == 1) or name == "no_gate" for row in rows)
    assert rejected["no_gate"] == 0 < rejected["grpo"]

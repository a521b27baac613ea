"""A run on a reasoning-gym task with its own verifier, end to end."""

from __future__ import annotations

import re
from pathlib import Path

from tests.e2e.world import dump, make_world, metrics

TASK = "reasoning_gym:gcd"


def test_a_run_on_a_task(tmp_path: Path) -> None:
    """The model's words mark an answer each, 0, 1 or 2: a random one often says 1, the commonest divisor."""
    world = make_world(tmp_path)
    words = world.model / "tokenizer.json"
    mark = lambda m: f'"<answer>{int(m[1]) % 3}</answer>w{m[1]}"'  # noqa: E731
    words.write_text(re.sub(r'"w(\d+)"', mark, words.read_text()))
    run = world.train(
        "gym",
        run={"steps": 1, "dump_rollouts": True},
        data={"train": TASK, "test": TASK, "reasoning_gym": {"max_value": 60}, "test_problems": 20},
        reward={"name": "reasoning_gym", "workers": 1, "timeout_seconds": 60.0},
        sampling={"max_prompt_tokens": 64, "stop": ["w1", "w2"]},  # only a response that has ended demonstrates
        evaluation={"problems": 10, "temperature": 1.0, "top_p": 1.0},
    )
    before, row = metrics(run)
    assert 0 < before["evaluation/accuracy"] < 1
    assert 0 < row["reward/mean"] < 1 and row["optimizer/grad_norm"] > 0
    examples = dump(run, 1).examples
    assert {e.rollout.prompt_id.partition("-")[0] for e in examples} == {"gcd"}
    assert {e.demonstration_source for e in examples} >= {"group"}, "successes demonstrate for the others"

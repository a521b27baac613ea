"""Training from the dumps of an earlier run, without sampling: every condition and option runs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asd_megatron import train
from asd_megatron.observe.names import undocumented
from asd_megatron.observe.writer import read_metrics
from tests.e2e.world import World, assert_close, dump, metrics, refusal, write_lines

LAMBDA = 0.5


@pytest.fixture(scope="module")
def recorded(world: World) -> Path:
    return world.train("recorded", **{"run": {"dump_rollouts": True}, "algorithm": {"lambda_max": LAMBDA}})


def replay(world: World, recorded: Path, name: str, *overrides: str, **sections: dict[str, Any]) -> Path:
    rollout = {"engine": "replay", "replay_folder": str(recorded)}
    folder = world.train(name, *overrides, rollout=rollout, **{"run": {"dump_rollouts": True}, **sections})
    rows = read_metrics(folder)
    assert [row["step"] for row in rows] == [1, 2]
    assert undocumented(name for row in rows for name in row) == []
    assert all(row["optimizer/skipped"] == 0 and row["optimizer/grad_norm"] > 0 for row in rows)
    assert all(row["tokens/not_finite"] == 0 for row in rows)
    return folder


def test_the_recorded_run_again(world: World, recorded: Path) -> None:
    folder = replay(world, recorded, "again", "--algorithm.lambda_max", str(LAMBDA))
    assert metrics(folder) == metrics(recorded)
    for step in (1, 2):
        assert dump(folder, step).examples == dump(recorded, step).examples


def phi(u: np.ndarray) -> np.ndarray:
    return (np.logaddexp(0, u) - math.log(2)) / 2


FORMULAS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "grpo": lambda a, u: a,
    "sd": lambda a, u: a + LAMBDA * u,
    "antisd": lambda a, u: a - LAMBDA * phi(u),
    "reverse_kl_ascent": lambda a, u: a - LAMBDA * u,
    "no_gate": lambda a, u: a - LAMBDA * phi(u),
    "multiplicative": lambda a, u: a * np.maximum(0, 1 - LAMBDA * phi(u) * np.sign(a)),
    "student_entropy_gate": lambda a, u: a - LAMBDA * phi(u),
    "no_teacher": lambda a, u: a - LAMBDA * phi(u),
}


@pytest.mark.parametrize("condition", FORMULAS)
def test_every_condition(world: World, recorded: Path, condition: str) -> None:
    """With a gate that is open from the first step; the advantage of every token by the condition's own formula."""
    folder = replay(world, recorded, f"condition_{condition}", algorithm={"name": condition}, gate={"h_warm": 0.1})
    for row in read_metrics(folder):
        assert row.get("gate/lambda") == (None if condition == "grpo" else LAMBDA)
    for step in (1, 2):
        found = dump(folder, step)
        columns = {name: values.double().numpy() for name, values in found.table.columns.items()}
        lengths = [len(example.rollout.response_ids) for example in found.examples]
        a = np.repeat([example.group_advantage for example in found.examples], lengths)
        u = columns.get("pmi", np.zeros_like(a))
        if condition == "no_teacher":
            assert np.array_equal(u, -columns["student_logprobs"]) and "teacher_logprobs" not in columns
        elif condition == "grpo":
            assert "teacher_logprobs" not in columns
        else:
            np.testing.assert_allclose(u, columns["teacher_logprobs"] - columns["student_logprobs"], atol=1e-5)
        assert np.ptp(a) > 0 and (condition == "grpo" or np.ptp(u) > 0)
        np.testing.assert_allclose(columns["advantage"], FORMULAS[condition](a, u), rtol=1e-5, atol=1e-6)


OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "batch_normalization": {"algorithm": {"term_normalization": "batch", "term_clip": 1.0}},
    "sequence_normalization": {"algorithm": {"term_normalization": "sequence", "term_max_position": 5}},
    "clipped_u": {"algorithm": {"pmi_clip": 0.1}},
    "masked_truncated": {"algorithm": {"mask_truncated": True}},
    "sequence_mean": {"algorithm": {"aggregation": "sequence_mean"}},
    "constant_length": {"algorithm": {"aggregation": "constant_length", "constant_length": 12}},
    "own_success": {"privileged": {"exclude_self": False}},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_the_method(world: World, recorded: Path, option: str) -> None:
    rows = read_metrics(replay(world, recorded, f"option_{option}", **OPTIONS[option]))
    original = read_metrics(recorded)
    alike = math.isclose(rows[0]["entropy/student_mean"], original[0]["entropy/student_mean"], rel_tol=1e-5)
    assert alike or option == "masked_truncated"  # which leaves tokens out of the entropies
    if option == "own_success":
        assert sum(row["demonstration/self"] for row in rows) > 0
    else:
        assert rows[1]["optimizer/grad_norm"] != original[1]["optimizer/grad_norm"]


@pytest.mark.parametrize(
    "sections",
    [
        {"batching": {"tokens_per_microbatch": 16}},
        {"model": {"recompute": "full"}},
        {"algorithm": {"importance_correction": "truncated"}},  # on-policy these weights are 1
        {"algorithm": {"importance_correction": "masked", "importance_level": "geometric"}},
        {"parallelism": {"distributed_optimizer": True}},
    ],
)
def test_options_that_change_no_number(world: World, recorded: Path, sections: dict[str, dict[str, Any]]) -> None:
    name = "_".join(str(value) for keys in sections.values() for value in keys.values())
    rows = metrics(replay(world, recorded, f"same_{name}", **sections))
    for row in rows if "importance_correction" in sections.get("algorithm", {}) else []:
        assert math.isclose(row.pop("importance/mean"), 1.0, rel_tol=1e-4)
        assert row.pop("importance/affected") == 0.0
    assert_close(rows, metrics(recorded), 1e-4)


def test_u_logged_for_grpo(world: World, recorded: Path) -> None:
    rows = read_metrics(replay(world, recorded, "logged", algorithm={"name": "grpo", "log_pmi": True}))
    assert math.isclose(rows[0]["pmi/mean"], read_metrics(recorded)[0]["pmi/mean"], rel_tol=1e-5)
    assert not any(name.startswith("gate/") for row in rows for name in row)


@pytest.mark.parametrize("rule", ["mask", "reference_answer", "feedback_only"])
def test_problems_without_solutions(world: World, recorded: Path, rule: str) -> None:
    lines = [json.loads(line) for line in world.problems.read_text().splitlines()]
    bare = write_lines(world.folder / "bare.jsonl", [{k: v for k, v in x.items() if k != "solution"} for x in lines])
    folder = replay(world, recorded, f"bare_{rule}", data={"train": str(bare)}, privileged={"when_no_solution": rule})
    for row in read_metrics(folder):
        without = 12 - row["demonstration/group"]
        assert row[f"demonstration/{'none' if rule == 'mask' else rule}"] == without > 0
        assert row["rollouts/masked"] == (without if rule == "mask" else 0)
        assert row["pmi/coverage"] == 1 - row["rollouts/masked"] / 12


def test_several_updates_a_batch(world: World, recorded: Path) -> None:
    """Four of them: two mini-batches, twice. The ratios leave 1, some are clipped, u stays that of the old weights."""
    algorithm = {"updates_per_batch": 2, "epochs": 2, "clip_low": 0.01, "clip_high": 0.01}
    folder = replay(world, recorded, "updates", algorithm=algorithm, optimizer={"learning_rate": 1e-2})
    rows, original = metrics(folder), metrics(recorded)
    assert all(0 < row["loss/clip_fraction"] < 1 for row in rows)
    assert original[0]["loss/clip_fraction"] == 0
    assert math.isclose(rows[0]["pmi/mean"], original[0]["pmi/mean"], rel_tol=1e-5)


def test_a_recording_that_does_not_fit(world: World, recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*overrides: str, folder: Path = recorded) -> str:
        recipe = world.recipe(rollout={"engine": "replay", "replay_folder": str(folder)})
        name = ["--run.name", "misfit", "--run.overwrite", "true"]
        return refusal(capsys, train.main, [str(recipe), *name, *overrides])

    message = refused(folder=world.folder)
    assert "rollout.replay_folder" in message and "run.dump_rollouts: true" in message
    assert "set sampling.temperature to the recorded one" in refused("--sampling.temperature", "0.7")
    assert "replay with the data file, run.seed" in refused("--run.seed", "5")
    assert "set sampling.rollouts_per_problem" in refused("--sampling.rollouts_per_problem", "3")
    assert "use the tokenizer and the prompt settings" in refused("--data.system", "w9")
    assert "step_000003.parquet" in refused("--run.steps", "3")

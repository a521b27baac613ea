"""Whoever holds the exported weights of step 1 can recompute every number of step 2's rollout dump."""

from __future__ import annotations

import statistics
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch

from asd_megatron import train
from asd_megatron.observe.dumps import Dump, dump_path, read_dump
from asd_megatron.observe.writer import read_metrics
from tests.e2e.world import call
from tests.puzzle_recipe import write_recipe
from tests.reference.dense import DenseGate, DenseRecipe, DenseResult, exact, score_batch

RUNS: dict[str, tuple[dict[str, Any], DenseRecipe]] = {
    # the warm-up step calibrates the gate, the trigger decides step 2's lambda
    "gated": (
        {"algorithm": {"name": "antisd"}, "gate": {"warmup_steps": 1, "tau_down": 0.01}},
        DenseRecipe("antisd", warmup_steps=1, tau_down=0.01),
    ),
    "closed": (
        {"algorithm": {"name": "antisd"}, "gate": {"warmup_steps": 1}},
        DenseRecipe("antisd", warmup_steps=1),
    ),
    "options": (
        {
            "algorithm": {
                "name": "sd",
                "lambda_max": 0.3,
                "updates_per_batch": 2,
                "term_normalization": "sequence",
                "term_clip": 2.0,
                "pmi_clip": 3.0,
                "mask_truncated": True,
            },
            "sampling": {"temperature": 1.3, "max_response_tokens": 9},
        },
        DenseRecipe(
            "sd",
            temperature=1.3,
            lambda_max=0.3,
            term_normalization="sequence",
            term_clip=2.0,
            pmi_clip=3.0,
            mask_truncated=True,
        ),
    ),
    "no_teacher": (
        {"algorithm": {"name": "no_teacher"}, "gate": {"h_warm": 1e-4}},
        DenseRecipe("no_teacher", warmup_steps=0),
    ),
}


def run(folder: Path, name: str) -> Path:
    sections: dict[str, dict[str, Any]] = {
        "run": {"name": name, "folder": str(folder / name), "steps": 2, "dump_rollouts": True},
        "sampling": {"problems_per_step": 5, "max_response_tokens": 24},
        "optimizer": {"learning_rate": 3e-4},
        "batching": {"tokens_per_microbatch": 400},
        "checkpoint": {"export_every": 1},
    }
    for section, keys in RUNS[name][0].items():
        sections[section] = {**sections.get(section, {}), **keys}
    recipe = write_recipe(folder / f"{name}.yaml", **sections)
    assert call(train.main, [str(recipe)]) == 0
    return folder / name


def recompute(model_folder: Path, dump: Dump, recipe: DenseRecipe) -> DenseResult:
    from transformers import AutoModelForCausalLM

    model = exact(AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32))
    gate = DenseGate(h_warm=dump.info.h_warm, warmup=[dump.info.h_warm or 0.0] * (recipe.warmup_steps or 0))
    return score_batch(model, dump.examples, recipe, gate)


def largest_difference(dump: Dump, name: str, rows: list[torch.Tensor | None]) -> float:
    """Over the rollouts that have the number; the dump has it nowhere else."""
    found = dump.table.rows(name)
    for row, wanted in zip(found, rows, strict=True):
        assert torch.isnan(row).all() if wanted is None else torch.isfinite(row).all()
    pairs = zip(found, rows, strict=True)
    return max(float((row.double() - wanted).abs().max()) for row, wanted in pairs if wanted is not None and len(row))


@pytest.mark.parametrize("name", list(RUNS))
def test_every_number_of_step_2(name: str, tmp_path: Path) -> None:
    folder = run(tmp_path, name)
    recipe = RUNS[name][1]
    dump = read_dump(dump_path(folder, 2))
    before = recompute(folder / "hf" / "step_000001", dump, recipe)
    examples, info = dump.examples, dump.info
    assert len(examples) == 20 and info.step == 2 and info.temperature == recipe.temperature
    assert {e.rollout.weight_version for e in examples} == {1}

    context = [e.has_context for e in examples]
    taught = recipe.condition != "no_teacher"
    assert any(context) == taught
    assert largest_difference(dump, "student_logprobs", list(before.student_logprobs)) < 1e-5
    assert largest_difference(dump, "student_entropy", list(before.student_entropy)) < 1e-5
    pmi = [u if c or not taught else None for u, c in zip(before.pmi, context, strict=True)]
    assert largest_difference(dump, "pmi", pmi) < 2e-5
    if taught:
        assert largest_difference(dump, "teacher_logprobs", before.teacher_logprobs) < 1e-5
        assert largest_difference(dump, "teacher_entropy", before.teacher_entropy) < 1e-5
    else:
        assert "teacher_logprobs" not in dump.table
    engine = [torch.tensor(e.rollout.logprobs, dtype=torch.float64) for e in examples]
    assert max(float((a - b).abs().max()) for a, b in zip(engine, before.student_logprobs, strict=True)) < 1e-5

    for _, members in groupby(examples, key=lambda e: e.rollout.prompt_id):
        group = list(members)
        rewards = [e.reward for e in group]
        spread = statistics.stdev(rewards)
        for e in group:
            wanted = (e.reward - statistics.mean(rewards)) / (spread + 1e-6) if spread else 0.0
            assert e.group_advantage == pytest.approx(wanted, abs=1e-12)
    # a normalised term divides by its deviation, which can be small
    assert largest_difference(dump, "advantage", list(before.advantage)) < (1e-3 if name == "options" else 1e-5)
    assert any(e.group_advantage for e in examples)

    assert info.lam == before.lam == (0.0 if name == "closed" else recipe.lambda_max)
    assert info.H is not None and abs(info.H - (before.median_entropy or 0.0)) < 1e-5
    metrics = {row["step"]: row for row in read_metrics(folder)}
    assert metrics[2]["gate/lambda"] == info.lam and metrics[2]["gate/entropy"] == info.H
    if recipe.warmup_steps:
        assert info.h_warm == read_dump(dump_path(folder, 1)).info.H and metrics[1]["gate/lambda"] == 0
    if name == "options":
        assert any(e.rollout.truncated for e in examples) and not all(e.rollout.truncated for e in examples)

    after = recompute(folder / "hf" / "step_000002", dump, recipe)  # not the weights after the update
    assert largest_difference(dump, "student_logprobs", list(after.student_logprobs)) > 1e-3

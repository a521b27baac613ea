"""The recipe's defaults are the paper's: arXiv 2605.11609, Table 5, Eq. 6 and 7, Algorithm 1, and section 4."""

from __future__ import annotations

from typing import Any

import pytest

from asd_megatron.antisd import Condition, Gate, condition
from asd_megatron.config import Recipe
from asd_megatron.run.build import make_gate, make_method
from asd_megatron.trainer.pass_plan import plan_passes

PAPER: dict[str, Any] = {
    "algorithm.name": "antisd",
    "algorithm.lambda_max": 0.5,
    "algorithm.clip_low": 0.2,
    "algorithm.clip_high": 0.2,
    "algorithm.aggregation": "token_mean",
    "algorithm.updates_per_batch": 1,  # on-policy
    "algorithm.epochs": 1,
    "algorithm.pmi_clip": None,  # u, the term and the loss are as in the equations: nothing clamped, scaled or left out
    "algorithm.term_normalization": "none",
    "algorithm.term_clip": None,
    "algorithm.term_max_position": None,
    "algorithm.importance_correction": "none",
    "algorithm.mask_truncated": False,
    "algorithm.kl_coefficient": 0.0,
    "teacher.weights": "live",
    "gate.tau_down": 0.93,
    "gate.tau_up": 1.0,
    "gate.h_warm": None,
    "privileged.success_threshold": 1.0,
    "privileged.strip_thinking": False,
    "privileged.when_no_solution": "mask",
    "sampling.problems_per_step": 32,
    "sampling.rollouts_per_problem": 8,
    "sampling.temperature": 1.0,
    "sampling.top_p": 1.0,
    "sampling.top_k": 0,
    "evaluation.temperature": 0.7,
    "evaluation.top_p": 0.95,
    "evaluation.top_k": 0,
    "optimizer.learning_rate": 1e-6,
    "optimizer.schedule": "constant",
    "optimizer.warmup_steps": 0,
    "run.steps": 200,
    "rollout.overlap": False,  # on-policy
    "rollout.oversampling": 1.0,
}


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return Recipe.model_validate({"model": {"path": "m"}, "data": {"train": "d.jsonl"}})


@pytest.mark.parametrize("key", PAPER)
def test_the_default_of_every_key_is_the_papers(key: str, recipe: Recipe) -> None:
    section, name = key.split(".")
    assert getattr(getattr(recipe, section), name) == PAPER[key]


def test_the_gate_warms_up_for_five_steps(recipe: Recipe) -> None:
    assert recipe.gate_warmup_steps == 5
    assert make_gate(recipe).warmup_steps == 5


def test_the_method_without_a_recipe_has_the_same_defaults(recipe: Recipe) -> None:
    from asd_megatron.trainer.token_method import Method

    assert make_method(recipe) == Method(condition("antisd"))
    gate = Gate.for_condition("antisd", warmup_steps=5)
    assert (gate.lambda_max, gate.tau_down, gate.tau_up) == (0.5, 0.93, 1.0)


def test_the_default_condition_is_the_papers_antisd() -> None:
    """A = A_seq - lambda * phi(u), u from the teacher, gated by the teacher's entropy; one scoring pass, one update."""
    assert condition("antisd") == Condition(
        "antisd",
        uses_teacher=True,
        sign=-1,
        composition="additive",
        shape="phi",
        gated=True,
        gate_entropy="teacher",
        u_source="teacher",
    )
    plan = plan_passes("antisd")
    assert plan.teacher_scoring and not plan.student_scoring and plan.updates == 1

"""The recipe's defaults are the paper's: arXiv 2605.11609, Table 5, Eq. 6 and 7, Algorithm 1, and section 4. A key
about which it says nothing is neutral: it leaves the method as it is, for the reason given here."""

from __future__ import annotations

from typing import Any

import pytest

from asd_megatron.antisd import Condition, Gate, condition
from asd_megatron.config import Recipe
from asd_megatron.config.base import section_schema
from asd_megatron.config.refusals import dotted_keys
from asd_megatron.run.build import example_builder
from asd_megatron.run.method import (
    make_gate,
    make_method,
    make_outliers,
    make_perplexity,
)
from asd_megatron.trainer.pass_plan import plan_passes

PAPER: dict[str, Any] = {
    # Algorithm 1 and Eq. 6: A = A_seq - lambda * phi(u), in the clipped policy gradient of on-policy batches
    "algorithm.name": "antisd",
    "algorithm.lambda_max": 0.5,  # Table 5
    "algorithm.lambda_source": "gate",  # Eq. 7
    "algorithm.estimator": "sampled",
    "algorithm.clip_low": 0.2,  # Table 5
    "algorithm.clip_high": 0.2,
    "algorithm.updates_per_batch": 1,  # on-policy
    "algorithm.epochs": 1,
    "algorithm.advantage_weight": 1.0,
    "algorithm.aggregation": "token_mean",
    # Table 5 and Eq. 7
    "gate.warmup_steps": None,  # 5 with a gate, see below
    "algorithm.kl_coefficient": 0.0,  # Table 5
    "algorithm.policy_loss": "ppo_clip",  # Algorithm 1, line 11
    "algorithm.entropy_coefficient": 0.0,
    "algorithm.group_advantage": "normalized",  # A_seq of GRPO
    "algorithm.whiten_advantages": False,
    "algorithm.overlong_buffer": 0,
    "algorithm.overlong_penalty": 1.0,  # DAPO, Eq. 13
    "sampling.redraw": "never",
    "sampling.redraw_limit": None,  # ten batches in all, as in DAPO's scripts
    "teacher.weights": "live",  # the same network
    "gate.tau_down": 0.93,
    "gate.tau_up": 1.0,
    "gate.h_warm": None,
    # section 4, Appendix C: each rollout has its own verified solution from the group, or the data's
    "privileged.demonstrations_per_group": None,
    "privileged.success_threshold": 1.0,
    "privileged.use_group": True,
    "privileged.use_reference": True,
    "privileged.when_no_solution": "mask",
    # Table 5
    "sampling.problems_per_step": 32,
    "sampling.rollouts_per_problem": 8,
    "sampling.temperature": 1.0,
    "sampling.top_p": 1.0,
    "evaluation.temperature": 0.7,
    "evaluation.top_p": 0.95,
    "optimizer.learning_rate": 1e-6,
    "run.steps": 200,
    "rollout.overlap": False,  # on-policy
    "rollout.oversampling": 1.0,
}

OFF = "changes the term, the advantage or the loss beyond the equations: off"
READ_ONLY_WITH = "read only with another key, which is off"
NEUTRAL: dict[str, tuple[Any, str]] = {
    "algorithm.composition": (None, "the condition's own, which is Eq. 6"),
    "algorithm.divergence": (None, READ_ONLY_WITH),
    "algorithm.direction": (None, READ_ONLY_WITH),
    "algorithm.mixture": (0.5, READ_ONLY_WITH),
    "algorithm.teacher_states": ("device", READ_ONLY_WITH),
    "algorithm.constant_length": (None, READ_ONLY_WITH),
    "algorithm.pmi_clip": (None, OFF),
    "algorithm.outlier_deviations": (None, OFF),
    "algorithm.term_normalization": ("none", OFF),
    "algorithm.term_clip": (None, OFF),
    "algorithm.term_max_position": (None, OFF),
    "algorithm.term_max_length": (None, OFF),
    "algorithm.importance_correction": ("none", OFF),
    "algorithm.importance_level": ("token", READ_ONLY_WITH),
    "algorithm.importance_cap": (2.0, READ_ONLY_WITH),
    "algorithm.importance_floor": (None, READ_ONLY_WITH),
    "algorithm.mask_truncated": (False, OFF),
    "algorithm.kl_estimator": ("k2", READ_ONLY_WITH),
    "teacher.ema_rate": (0.05, READ_ONLY_WITH),
    "algorithm.log_pmi": (False, "a measurement"),
    "privileged.max_solution_tokens": (8192, "a bound on memory, above the usual solution"),
    "privileged.min_solution_tokens": (128, "a bound on memory"),
    "privileged.max_teacher_tokens": (None, "the model's own bound"),
    "privileged.exclude_self": (True, "a rollout is not its own solution where there is another"),
    "privileged.strip_thinking": (False, "solutions are shown as they are"),
    "privileged.chat_template": (section_schema(Recipe, "privileged").model_fields["chat_template"].default, "wording"),
    "privileged.raw_template": (None, "for prompts that are no chat"),
    "sampling.top_k": (0, "off"),
    "sampling.max_prompt_tokens": (2048, "a bound on memory; the paper gives 32K for prompt and response together"),
    "sampling.max_response_tokens": (1024, "fits a small machine; the paper's 32K has to be asked for"),
    "sampling.stop": ((), "off"),
    "sampling.stop_token_ids": (None, "the model's own end tokens"),
    "evaluation.every": (0, "when to measure"),
    "evaluation.at_start": (True, "when to measure"),
    "evaluation.at_end": (True, "when to measure"),
    "evaluation.problems": (None, "all problems"),
    "evaluation.samples": (1, "the paper's 32 (4 for MinervaMath) belong to its benchmarks"),
    "evaluation.top_k": (0, "off"),
    "evaluation.sets": ({}, "the paper's benchmarks are files of the user's (docs/evaluation.md)"),
    "optimizer.min_learning_rate": (0.0, "read only with a schedule that falls"),
    "optimizer.schedule": ("constant", "off"),
    "optimizer.warmup_steps": (0, "off"),
    "optimizer.weight_decay": (0.01, "AdamW's own default"),
    "optimizer.beta1": (0.9, "AdamW's own default"),
    "optimizer.beta2": (0.999, "AdamW's own default"),
    "optimizer.epsilon": (1e-8, "AdamW's own default"),
    "optimizer.clip_grad": (1.0, "the usual value of the framework that the paper trains with"),
    "optimizer.moments": ("float32", "the exact arithmetic"),
    "optimizer.offload": ("none", "off"),
    "optimizer.grad_spike": ("none", "off"),
    "optimizer.grad_spike_factor": (3.0, "read with optimizer.grad_spike alone"),
}
# The released code's alternative to the gate. Its section is read only with another `algorithm.lambda_source`.
RELEASED: dict[str, Any] = {
    "perplexity.warmup_steps": None,
    "perplexity.target": None,
    "perplexity.target_offset": 0.1,
    "perplexity.target_ratio": None,
    "perplexity.lambda_0": 0.1,
    "perplexity.alpha": 2.0,
    "perplexity.lambda_min": -0.02,
    "perplexity.cutoff": 3.0,
    "perplexity.scope": "response",
    "perplexity.shift": "none",
}
DEFAULTS = PAPER | {key: value for key, (value, _) in NEUTRAL.items()} | RELEASED
OF_THE_METHOD = ("algorithm", "gate", "perplexity", "privileged", "teacher", "sampling", "optimizer", "evaluation")


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return Recipe.model_validate({"model": {"path": "m"}, "data": {"train": "d.jsonl"}})


@pytest.mark.parametrize("key", DEFAULTS)
def test_the_default_of_every_key_is_the_papers_or_neutral(key: str, recipe: Recipe) -> None:
    section, name = key.split(".")
    assert getattr(getattr(recipe, section), name) == DEFAULTS[key]


def test_no_key_of_the_method_is_without_a_reason_for_its_default() -> None:
    keys = [key for key in dotted_keys(Recipe) if key.partition(".")[0] in OF_THE_METHOD]
    assert [key for key in keys if key not in DEFAULTS] == []
    assert not set(DEFAULTS) - set(dotted_keys(Recipe))
    assert len(DEFAULTS) == len(PAPER) + len(NEUTRAL) + len(RELEASED)  # each key stands in one table


def test_the_optimizer_is_adamw() -> None:
    assert (section_schema(Recipe, "optimizer").__doc__ or "").startswith("AdamW")


def test_the_gate_warms_up_for_five_steps(recipe: Recipe) -> None:
    assert recipe.gate_warmup_steps == recipe.lambda_warmup_steps == 5
    assert make_gate(recipe).warmup_steps == 5


@pytest.mark.parametrize("tokens", [1024, 32_768])
def test_each_rollout_draws_its_own_demonstration_at_any_length(tokens: int) -> None:
    values = {"model": {"path": "m"}, "data": {"train": "d"}, "sampling": {"max_response_tokens": tokens}}
    renderer: Any = None
    for given in ({}, {"demonstrations_per_group": 1}):
        recipe = Recipe.model_validate({**values, "privileged": given})
        builder = example_builder(recipe, renderer, privileged=True, feedback_kind="binary", max_positions=40_960)
        assert builder.demonstrations_per_group == given.get("demonstrations_per_group")
        assert builder.use_group and builder.use_reference


def test_the_method_without_a_recipe_has_the_same_defaults(recipe: Recipe) -> None:
    from asd_megatron.trainer.token_method import Method

    assert make_method(recipe) == Method(condition("antisd"))
    assert make_perplexity(recipe) is None and make_outliers(recipe) is None
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

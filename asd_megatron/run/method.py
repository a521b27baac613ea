"""The method's objects from a recipe's sections: condition, passes, gate and other rules for lambda, the loss."""

from __future__ import annotations

from dataclasses import replace

from asd_megatron.antisd import (
    Condition,
    Gate,
    KlPenalty,
    OutlierLimit,
    Overlong,
    PerplexityLambda,
    PerplexityRule,
    condition,
)
from asd_megatron.config import Recipe
from asd_megatron.distributed.layout import ProcessGroups
from asd_megatron.errors import UserError
from asd_megatron.models.precision import ScoreFormats
from asd_megatron.ops.vocab_divergence import Divergence
from asd_megatron.run.strength import TermStrength
from asd_megatron.trainer.examples import Signal
from asd_megatron.trainer.pass_plan import PassPlan, plan_passes
from asd_megatron.trainer.token_method import ExactTerm, Method


def make_condition(recipe: Recipe) -> Condition:
    """The recipe's condition, with the composition that it chooses; not gated where something else sets lambda."""
    a = recipe.algorithm
    named = condition(a.name)
    return replace(named, composition=a.composition or named.composition, gated=named.gated and a.gated)


def make_method(recipe: Recipe) -> Method:
    """The algorithm section as the trainer's plain values."""
    a = recipe.algorithm
    return Method(
        condition=make_condition(recipe),
        clip_low=a.clip_low,
        clip_high=a.clip_high,
        aggregation=a.aggregation,
        constant_length=a.constant_length,
        pmi_clip=a.pmi_clip,
        term_normalization=a.term_normalization,
        term_clip=a.term_clip,
        term_max_position=a.term_max_position,
        term_max_length=a.term_max_length,
        advantage_weight=a.advantage_weight,
        importance_cap=None if a.importance_correction == "none" else a.importance_cap,
        importance_floor=a.mask_below,
        importance_level=a.importance_level,
        exact=exact_term(recipe),
        kl=KlPenalty(a.kl_estimator, a.kl_coefficient) if a.kl_coefficient > 0 else None,
        policy_loss=a.policy_loss,
        entropy_coefficient=a.entropy_coefficient,
    )


def exact_term(recipe: Recipe) -> ExactTerm | None:
    """The divergence of `algorithm.estimator: full_vocabulary` and its direction, by default those that the sampled
    term of `algorithm.name` estimates; None with the sampled estimator."""
    a = recipe.algorithm
    if a.estimator == "sampled":
        return None
    direction = a.direction or ("descend" if condition(a.name).sign > 0 else "ascend")
    return ExactTerm(Divergence(a.divergence_kind, a.mixture), 1 if direction == "descend" else -1)


def make_overlong(recipe: Recipe) -> Overlong | None:
    """The penalty of responses near the token limit; None for recipes without one."""
    a = recipe.algorithm
    if a.overlong_buffer == 0:
        return None
    return Overlong(recipe.sampling.max_response_tokens, a.overlong_buffer, a.overlong_penalty)


def make_signal(recipe: Recipe) -> Signal:
    """What `sampling.redraw: no_signal` keeps a group for."""
    a = recipe.algorithm
    return Signal(a.weighs_group_advantage, context=a.adds_term, mask_truncated=a.mask_truncated)


def make_plan(recipe: Recipe) -> PassPlan:
    """The passes of one step. Raises UserError for a scoring pass that is to be replayed and does not exist."""
    a = recipe.algorithm
    plan = plan_passes(
        make_condition(recipe),
        a.updates_per_batch,
        a.term_normalization,
        epochs=a.epochs,
        log_pmi=a.log_pmi,
        importance=a.importance_correction != "none",
        importance_level=a.importance_level,
        exact=a.estimator == "full_vocabulary",
        perplexity=a.lambda_source == "teacher_perplexity",
        teacher_copy=None if recipe.teacher.weights == "live" else recipe.teacher.weights,
        kl_penalty=a.kl_coefficient > 0,
        fp8=recipe.precision.fp8_passes,
        policy_loss=a.policy_loss,
    )
    if recipe.rollout.routing_replay == "scoring" and not plan.student_scoring:
        raise UserError(
            "rollout.routing_replay scoring replays the student's scoring pass, and a step of this recipe has none: set"
            " algorithm.updates_per_batch or algorithm.epochs above 1, or rollout.routing_replay none"
        )
    return plan


def never_acts(recipe: Recipe, *, done: int = 0, warm_up: int | None = None) -> str | None:
    """Why the per-token term cannot act in any step of this recipe's run after the `done` ones; None if it can.
    `warm_up`: its warm-up steps still to be made; None: all."""
    steps, warm_up = recipe.run.steps - done, recipe.lambda_warmup_steps if warm_up is None else warm_up
    by_gate = recipe.algorithm.lambda_source == "gate"
    if condition(recipe.algorithm.name).sign == 0:
        return None
    if by_gate and recipe.algorithm.lambda_max == 0:
        return (
            "algorithm.lambda_max 0: this run trains without the per-token term. Raise it, or set algorithm.name grpo,"
            " which scores no teacher"
        )
    if steps > warm_up or steps <= 0:
        return None
    of, remedy = "the gate", "lower gate.warmup_steps" + (", or give gate.h_warm" if recipe.algorithm.gated else "")
    if not by_gate:
        of, remedy = "the perplexity's target", "lower perplexity.warmup_steps, or give perplexity.target"
    left = f"run.steps {recipe.run.steps}" + (f" leaves {steps} after step {done}, which" if done else "")
    return (
        f"{left} is not above the {warm_up} warm-up steps of {of}, in which lambda is 0: this"
        f" run trains without the per-token term. Raise run.steps, {remedy}"
    )


def make_perplexity(recipe: Recipe) -> PerplexityLambda | None:
    """Lambda from the teacher's perplexity, before its warm-up; None for recipes whose lambda comes from the gate."""
    p = recipe.perplexity
    if recipe.algorithm.lambda_source != "teacher_perplexity" or condition(recipe.algorithm.name).sign == 0:
        return None
    rule = PerplexityRule(
        lambda_0=p.lambda_0,
        alpha=p.alpha,
        lambda_min=p.lambda_min,
        lambda_max=recipe.algorithm.lambda_max,
        cutoff=p.cutoff,
        scope=p.scope,
        shift=p.shift,
        target_ratio=p.target_ratio,
        target_offset=p.target_offset,
    )
    return PerplexityLambda(rule, recipe.lambda_warmup_steps, p.target)


def make_outliers(recipe: Recipe) -> OutlierLimit | None:
    """The limit of u's outliers, before its warm-up; None for recipes without the rule."""
    deviations = recipe.algorithm.outlier_deviations
    if deviations is None or condition(recipe.algorithm.name).sign == 0:
        return None
    return OutlierLimit(deviations, recipe.lambda_warmup_steps)


def make_gate(recipe: Recipe) -> Gate:
    """The gate of the recipe's condition, before its warm-up."""
    return Gate.for_condition(
        make_condition(recipe),
        warmup_steps=recipe.gate_warmup_steps,
        lambda_max=recipe.algorithm.lambda_max,
        tau_down=recipe.gate.tau_down,
        tau_up=recipe.gate.tau_up,
        h_warm=recipe.gate.h_warm,
    )


def make_strength(recipe: Recipe, process_groups: ProcessGroups, formats: ScoreFormats | None = None) -> TermStrength:
    """What sets lambda and the outlier limit of each step, before its warm-up. `formats`: the port's."""
    method, gate = make_method(recipe), make_gate(recipe)
    return TermStrength(process_groups, method, gate, make_perplexity(recipe), make_outliers(recipe), formats)

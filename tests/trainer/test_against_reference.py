"""The same hard batch through the product (float32, one process) and through the dense float64 reference."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from asd_megatron.antisd import CONDITIONS, condition
from asd_megatron.checks.cases import hard_batch
from asd_megatron.observe.metrics import PerplexityReading, step_metrics
from asd_megatron.records import Example, FinishReason
from tests.reference.dense import DenseGate, DensePerplexity, DenseRecipe, DenseResult, dense_update, score_batch
from tests.trainer.product import Product, Step, gate_of, strength_of

H_WARM = 0.5  # nats; the tiny model's median entropies lie above 4: the gate is open
COLUMNS = ("student_logprobs", "student_entropy", "pmi", "term", "advantage")


@pytest.fixture(scope="module")
def examples(dense: Any) -> list[Example]:
    """The parity check's batch (unequal lengths, one rollout without context, masked tokens, a group of equal rewards)
    with truncated responses and an engine whose log-probs differ from the trainer's by up to a nat or two."""
    noise = torch.Generator().manual_seed(7)
    scored = score_batch(dense, hard_batch(1), DenseRecipe(condition="grpo"), DenseGate())
    out = []
    for i, (e, s) in enumerate(zip(hard_batch(1), scored.student_logprobs, strict=True)):
        engine = s + 0.6 * torch.randn(len(s), generator=noise, dtype=torch.float64)
        reason = FinishReason.LENGTH if i % 4 == 2 else FinishReason.STOP
        rollout = replace(e.rollout, logprobs=tuple(engine.tolist()), finish_reason=reason)
        out.append(replace(e, rollout=rollout))
    return out


def settings(name: str, **options: Any) -> DenseRecipe:
    """Without a warm-up, so that the term acts."""
    return DenseRecipe(condition=name, warmup_steps=0, **options)


def run_both(
    product: Product, dense: Any, examples: Sequence[Example], recipe: DenseRecipe, **how: Any
) -> tuple[Step, DenseResult]:
    h_warm = H_WARM if condition(recipe.condition).gated else None
    found = product.step(examples, recipe, gate_of(recipe, h_warm), **how)
    expected = dense_update(dense, examples, recipe, DenseGate(h_warm=H_WARM))
    return found, expected


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest value; the difference itself where all is 0."""
    scale = float(expected.abs().max())
    return float((found - expected).abs().max()) / (scale or 1.0)


def check_scores(found: Step, expected: DenseResult) -> None:
    """Per-token numbers, H and lambda."""
    assert found.table is not None
    # grpo scores no teacher, the reference always does
    without_term = not found.plan.teacher_scoring and found.lam == 0
    for name in COLUMNS:
        if without_term and name in ("pmi", "term"):
            assert not found.table[name].any() or found.plan.student_scoring
            continue
        # float32 log-probs of some nats, whose difference is clipped to 0.2 in places
        assert relative(found.table[name].double(), torch.cat(getattr(expected, name))) < 2e-5, name
    for name in ("teacher_logprobs", "teacher_entropy"):
        if name in found.table:
            for row, wanted in zip(found.table.rows(name), getattr(expected, name), strict=True):
                if wanted is None:
                    assert not row.any()
                else:
                    assert relative(row.double(), wanted) < 1e-5, name
    if found.median_entropy is not None:
        assert found.median_entropy == pytest.approx(expected.median_entropy, rel=1e-6)
    if isinstance(found.reading, PerplexityReading):
        assert found.lam == pytest.approx(expected.lam, rel=1e-5, abs=1e-9)
        assert found.reading.lambdas.tolist() == pytest.approx(expected.lams, rel=1e-4, abs=1e-7)
        wanted = [math.nan if p is None else p for p in expected.perplexities]
        assert found.reading.perplexities.tolist() == pytest.approx(wanted, rel=1e-5, nan_ok=True)
    else:
        assert found.lam == expected.lam


def check_update(found: Step, expected: DenseResult, tolerance: float = 1e-5) -> None:
    """Losses (over the mean absolute advantage: on-policy losses are near 0) and every parameter's gradient."""
    scale = float(torch.cat(expected.advantage).abs().mean())
    assert len(found.stats.losses) == len(expected.losses)
    for loss, wanted in zip(found.stats.losses, expected.losses, strict=True):
        assert abs(loss - wanted) / scale < tolerance
    for k, (gradients, wanted_gradients) in enumerate(zip(found.gradients, expected.gradients, strict=True)):
        assert set(gradients) == set(wanted_gradients)
        for name, wanted_gradient in wanted_gradients.items():
            assert wanted_gradient.abs().max() > 0
            assert relative(gradients[name], wanted_gradient) < tolerance, (k, name)
        assert found.stats.grad_norms[k] == pytest.approx(expected.grad_norms[k], rel=tolerance)


def check(product: Product, dense: Any, examples: Sequence[Example], recipe: DenseRecipe, **how: Any) -> Step:
    found, expected = run_both(product, dense, examples, recipe, **how)
    check_scores(found, expected)
    check_update(found, expected)
    return found


AGGREGATIONS = {"token_mean": 1.0, "sequence_mean": 0.7, "constant_length": 1.3}  # and the temperature it is tried at


@pytest.mark.parametrize("aggregation", list(AGGREGATIONS))
@pytest.mark.parametrize("name", list(CONDITIONS))
def test_every_condition(name: str, aggregation: str, product: Product, dense: Any, examples: list[Example]) -> None:
    temperature = AGGREGATIONS[aggregation]
    recipe = settings(name, aggregation=aggregation, constant_length=25, temperature=temperature)
    found = check(product, dense, examples, recipe)
    c = condition(name)
    assert found.lam == (0.5 if c.sign else 0.0)
    assert found.plan.teacher_scoring == c.uses_teacher
    assert found.plan.student_scoring == (c.gate_entropy == "student")
    assert found.plan.head == "fused"
    assert found.stats.columns.clipped.sum() == 0


OPTIONS: dict[str, dict[str, Any]] = {
    "pmi_clip": {"pmi_clip": 0.8},
    "clips": {"pmi_clip": 0.8, "term_clip": 0.2, "temperature": 0.7},
    "sequence": {"term_normalization": "sequence"},
    "sequence_clipped": {"term_normalization": "sequence", "term_clip": 1.5, "pmi_clip": 1.5, "temperature": 0.7},
    "batch": {"term_normalization": "batch"},
    "batch_clipped": {"term_normalization": "batch", "term_clip": 1.5, "temperature": 0.7},
    "max_position": {"term_max_position": 6},
    "demean": {"term_normalization": "demean", "temperature": 0.7},
    "demean_clipped": {"term_normalization": "demean", "term_clip": 0.3, "pmi_clip": 1.5, "term_max_position": 9},
    "max_length": {"term_max_length": 11, "term_normalization": "batch"},
    "advantage_weight": {"advantage_weight": 0.25, "aggregation": "sequence_mean"},
    "max_position_sequence": {"term_max_position": 6, "term_normalization": "sequence"},
    "mask_truncated": {"mask_truncated": True},
    "mask_truncated_batch": {"mask_truncated": True, "term_normalization": "batch", "aggregation": "sequence_mean"},
    "gspo": {"policy_loss": "gspo", "aggregation": "sequence_mean", "importance": "truncated"},
    "cispo": {"policy_loss": "cispo", "temperature": 0.7},
    "entropy": {"entropy_coefficient": 0.3, "temperature": 0.7, "mask_truncated": True},
    "entropy_two_phase": {"entropy_coefficient": 0.3, "term_normalization": "sequence"},
    "importance": {"importance": "truncated"},
    "importance_normalized": {
        "importance": "truncated",
        "importance_cap": 1.2,
        "term_normalization": "sequence",
        "temperature": 0.7,
    },
    "importance_truncated_left_out": {
        "importance": "truncated",
        "mask_truncated": True,
        "aggregation": "constant_length",
    },
}


@pytest.mark.parametrize("options", list(OPTIONS))
@pytest.mark.parametrize("name", ["antisd", "sd", "no_teacher"])
def test_options(name: str, options: str, product: Product, dense: Any, examples: list[Example]) -> None:
    chosen = dict(OPTIONS[options])
    if name == "no_teacher" and "pmi_clip" in chosen:
        chosen["pmi_clip"] += 3.5  # its u = -s is not around 0
    recipe = settings(name, constant_length=25, **chosen)
    found = check(product, dense, examples, recipe)
    assert found.lam == 0.5
    scored_first = condition(name).gate_entropy == "student" or recipe.term_normalization == "batch"
    assert found.plan.student_scoring == scored_first
    two_phase = recipe.term_normalization in ("sequence", "demean") and not scored_first
    assert found.plan.head == ("two_phase" if two_phase else "fused")


@pytest.mark.parametrize("name", ["multiplicative", "reverse_kl_ascent", "student_entropy_gate"])
@pytest.mark.parametrize("normalization", ["sequence", "batch"])
def test_normalization_meets_the_other_compositions(
    name: str, normalization: str, product: Product, dense: Any, examples: list[Example]
) -> None:
    check(product, dense, examples, settings(name, term_normalization=normalization, temperature=0.7))


@pytest.mark.parametrize("normalization", ["none", "demean"])
@pytest.mark.parametrize(
    ("name", "composition"),
    [
        ("antisd", "multiplicative_plain"),
        ("sd", "multiplicative_plain"),
        ("sd", "rlsd"),
        ("reverse_kl_ascent", "rlsd"),
        ("sd", "multiplicative"),
    ],
)
def test_compositions(
    name: str, composition: str, normalization: str, product: Product, dense: Any, examples: list[Example]
) -> None:
    recipe = settings(name, composition=composition, term_normalization=normalization, lambda_max=0.8, temperature=0.7)
    found = check(product, dense, examples, recipe)
    assert found.table is not None
    a_seq = found.table.spread(torch.tensor([e.group_advantage for e in examples]))
    additive = a_seq + condition(name).sign * 0.8 * found.table["term"]
    assert relative(found.table["advantage"], additive) > 0.05


# Among the tiny model's perplexities of its random responses, 35 to some hundreds.
PERPLEXITY = DensePerplexity(target=110.0, cutoff=200.0, lambda_0=0.4, alpha=1.5, lambda_min=-0.3)
PERPLEXITIES: dict[str, dict[str, Any]] = {
    "response": {},
    "negative": {"perplexity": replace(PERPLEXITY, shift="negative", target=150.0)},
    "always": {"perplexity": replace(PERPLEXITY, shift="always"), "term_normalization": "sequence"},
    "batch": {"perplexity": replace(PERPLEXITY, scope="batch"), "term_normalization": "batch"},
    "multiplicative": {"composition": "multiplicative_plain", "term_normalization": "demean"},
    "exact": {"divergence": "jensen_shannon"},
    "several_updates": {"updates": 2},
}


@pytest.mark.parametrize("options", list(PERPLEXITIES))
def test_lambda_from_the_teachers_perplexity(
    options: str, product: Product, dense: Any, examples: list[Example]
) -> None:
    """With one lambda for each response, some 0, some negative, some at a bound."""
    recipe = settings("antisd", **{"perplexity": PERPLEXITY, "mask_truncated": True, **PERPLEXITIES[options]})
    strength = strength_of(recipe, product.process_groups)
    found = product.step(examples, recipe, strength)
    expected = dense_update(dense, examples, recipe, DenseGate())
    if recipe.divergence is None:
        check_scores(found, expected)
    check_update(found, expected)
    assert isinstance(found.reading, PerplexityReading) and not found.reading.warming_up
    lams = [lam for lam, p in zip(expected.lams, expected.perplexities, strict=True) if p is not None]
    assert None in expected.perplexities and 0.0 in lams
    assert (len(set(lams)) > 4) == (options != "batch")
    assert min(lams) < 0 or options == "batch"


@pytest.mark.parametrize(("name", "normalization"), [("antisd", "sequence"), ("sd", "none"), ("no_gate", "sequence")])
def test_outliers_over_steps(name: str, normalization: str, product: Product, dense: Any) -> None:
    """Two steps measure the deviation of u, one of them after a step without any context; later outliers count as 0."""
    recipe = DenseRecipe(
        name,
        outlier_deviations=0.9,
        warmup_steps=2,
        term_normalization=normalization,
        pmi_clip=1.5,
        perplexity=replace(PERPLEXITY) if name == "antisd" else None,
    )
    strength, memory = strength_of(recipe, product.process_groups), DenseGate()
    limits = []
    for k in range(4):
        batch = hard_batch(30 + k)
        if k == 1:
            batch = [replace(e, teacher_prompt_ids=None) for e in batch]
        found = product.step(batch, recipe, strength)
        limits.append(strength.outlier_limit)
        expected = dense_update(dense, batch, recipe, memory)
        check_scores(found, expected)
        check_update(found, expected)
        assert found.table is not None
    assert all(limit is not None and math.isnan(limit) for limit in limits[:3])
    assert limits[3] == pytest.approx(0.9 * sum(memory.deviations) / 2, rel=1e-5)
    metrics = step_metrics(
        batch, found.table, learning_rate=0, grad_norm=0, policy_loss=0, times={}, outlier_limit=limits[3]
    )
    assert 0.05 < metrics["outliers/share"] < 0.9 and metrics["outliers/limit"] == limits[3]


# Caps and floors between this batch's ratios, so that some weights are cut and some are not.
BOUNDS = {"token": (1.4, 0.6), "sequence": (3.0, 0.2), "geometric": (1.1, 0.9)}


def corrected(kind: str, level: str, **options: Any) -> dict[str, Any]:
    cap, floor = BOUNDS[level]
    return {"importance": kind, "importance_level": level, "importance_cap": cap, "importance_floor": floor, **options}


def check_importance(found: Step, expected: DenseResult, recipe: DenseRecipe) -> None:
    assert found.table is not None
    weights, affected = found.table["importance"].double(), found.table["importance_affected"].bool()
    assert relative(weights, torch.cat(expected.importance)) < 1e-5
    cut = recipe.importance_cap if recipe.importance == "truncated" else 0.0
    assert torch.equal(affected, (weights - cut).abs() < 1e-6)
    counts = found.table["loss_mask"]
    assert 0.05 < float(affected[counts].double().mean()) < 0.95


@pytest.mark.parametrize("normalization", ["none", "sequence", "batch"])
@pytest.mark.parametrize("level", list(BOUNDS))
@pytest.mark.parametrize("kind", ["truncated", "masked"])
def test_importance(
    kind: str, level: str, normalization: str, product: Product, dense: Any, examples: list[Example]
) -> None:
    options = {"mask_truncated": True} if normalization == "batch" else {"temperature": 0.9}
    recipe = settings("no_gate", **corrected(kind, level, term_normalization=normalization, **options))
    found, expected = run_both(product, dense, examples, recipe)
    check_scores(found, expected)
    check_update(found, expected)
    check_importance(found, expected, recipe)
    needs_rollouts = level != "token" or normalization == "sequence"
    assert found.plan.student_scoring == (normalization == "batch")
    assert found.plan.head == ("two_phase" if needs_rollouts and normalization != "batch" else "fused")


EXACT: dict[str, dict[str, Any]] = {
    "antisd": {"divergence": "jensen_shannon"},
    "sd": {"divergence": "reverse_kl", "ascend": False},
    "reverse_kl_ascent": {"divergence": "reverse_kl", "temperature": 0.7, "aggregation": "sequence_mean"},
    "no_gate": {"divergence": "forward_kl", "ascend": False, "temperature": 1.3, "term_max_position": 11},
    "student_entropy_gate": {
        "divergence": "jensen_shannon",
        "mixture": 0.8,
        "mask_truncated": True,
        "policy_loss": "gspo",
        "entropy_coefficient": 0.2,
    },
}


@pytest.mark.parametrize("name", list(EXACT))
def test_the_exact_divergence(name: str, product: Product, dense: Any, examples: list[Example]) -> None:
    found, expected = run_both(product, dense, examples, settings(name, **EXACT[name]), tokens_per_microbatch=90)
    assert found.table is not None and expected.lam > 0
    for column in ("student_logprobs", "pmi", "advantage"):
        assert relative(found.table[column].double(), torch.cat(getattr(expected, column))) < 2e-5, column
    # D is a difference of entropies of some nats
    assert (found.table["term"].double() - torch.cat(expected.term)).abs().max() < 1e-5
    check_update(found, expected)


@pytest.mark.parametrize(
    "options", [{"updates": 2, "epochs": 2}, {"importance": "truncated", "importance_level": "sequence"}]
)
def test_the_exact_divergence_after_a_scoring_pass(
    options: dict[str, Any], product: Product, dense: Any, examples: list[Example]
) -> None:
    """Several updates: the student's distribution moves, the teacher's stays that of the scoring weights."""
    recipe = settings("antisd", divergence="jensen_shannon", learning_rate=5e-3, epsilon=1e-4, clip_grad=0.5, **options)
    try:
        found, expected = run_both(product, copy.deepcopy(dense), examples, recipe)
        assert found.plan.student_scoring
        check_update(found, expected, tolerance=1e-4)
    finally:
        product.reload()


def test_options_change_the_update(product: Product, examples: list[Example]) -> None:
    """Each option does something on this batch: the comparisons above are not between two no-ops. (CISPO does so after
    the first update.)"""
    plain = product.step(examples, settings("no_gate"), gate_of(settings("no_gate")))
    for name, options in OPTIONS.items():
        options = options | ({"temperature": 1.0} if name == "cispo" else {})
        recipe = settings("no_gate", **options)
        other = product.step(examples, recipe, gate_of(recipe))
        assert other.table is not None and plain.table is not None
        changed = max(relative(other.gradients[0][n], g) for n, g in plain.gradients[0].items())
        assert changed < 1e-5 if name == "cispo" else changed > 1e-3, name


@pytest.mark.parametrize("tokens_per_microbatch", [1, 64, 10_000])
@pytest.mark.parametrize("normalization", ["none", "sequence", "batch"])
def test_micro_batches_do_not_matter(
    tokens_per_microbatch: int, normalization: str, product: Product, dense: Any, examples: list[Example]
) -> None:
    recipe = settings("no_gate", term_normalization=normalization, temperature=0.7)
    check(product, dense, examples, recipe, tokens_per_microbatch=tokens_per_microbatch)


@pytest.mark.parametrize("tokens_per_microbatch", [1, 64, 10_000])
@pytest.mark.parametrize("level", list(BOUNDS))
def test_importance_in_any_micro_batches(
    tokens_per_microbatch: int, level: str, product: Product, dense: Any, examples: list[Example]
) -> None:
    recipe = settings("no_gate", **corrected("masked", level))
    found, expected = run_both(product, dense, examples, recipe, tokens_per_microbatch=tokens_per_microbatch)
    check_update(found, expected)
    check_importance(found, expected, recipe)


def test_a_batch_that_is_masked_wholly_teaches_nothing(product: Product, examples: list[Example]) -> None:
    recipe = settings("no_gate", importance="masked", importance_cap=1e-7, importance_floor=0.0)
    found = product.step(examples, recipe, gate_of(recipe))
    assert found.stats.losses == (0.0,) and found.stats.grad_norms == (0.0,)
    assert found.table is not None and found.table["importance_affected"].all()


def test_rollouts_without_context_keep_their_group_advantage(product: Product, examples: list[Example]) -> None:
    recipe = settings("no_gate", term_normalization="batch")
    for batch in (examples, [replace(e, teacher_prompt_ids=None) for e in examples]):
        found = product.step(batch, recipe, gate_of(recipe))
        assert found.table is not None
        bare = [i for i, e in enumerate(batch) if not e.has_context]
        assert bare
        for i in bare:
            group = torch.full_like(found.table.rows("advantage")[i], batch[i].group_advantage)
            assert torch.equal(found.table.rows("advantage")[i], group)
            assert not found.table.rows("pmi")[i].any() and not found.table.rows("term")[i].any()
    assert found.median_entropy is None and found.lam == 0.5


def test_an_empty_context_has_no_pmi(product: Product, examples: list[Example]) -> None:
    """Exactly 0 when both sequences are scored in the same company, within 1e-6 otherwise."""
    batch = [replace(e, teacher_prompt_ids=e.rollout.prompt_ids) for e in examples]
    recipe = settings("no_gate")
    found = product.step(batch, recipe, gate_of(recipe))
    assert found.table is not None and not found.table["pmi"].any() and not found.table["term"].any()
    assert torch.equal(found.table["teacher_entropy"], found.table["student_entropy"])
    mixed = [b if i % 2 else e for i, (e, b) in enumerate(zip(examples, batch, strict=True))]
    found = product.step(mixed, recipe, gate_of(recipe), tokens_per_microbatch=60)
    assert found.table is not None
    assert max(float(found.table.rows("pmi")[i].abs().max()) for i in range(1, len(mixed), 2)) <= 1e-6


@pytest.mark.parametrize("mask_truncated", [False, True])
@pytest.mark.parametrize(("name", "whose"), [("antisd", "teacher"), ("no_teacher", "student")])
def test_the_entropy_metric_counts_the_tokens_of_the_gate(
    name: str, whose: str, mask_truncated: bool, product: Product, examples: list[Example]
) -> None:
    recipe = settings(name, mask_truncated=mask_truncated)
    found = product.step(examples, recipe, gate_of(recipe, H_WARM))
    assert found.table is not None
    metrics = step_metrics(examples, found.table, learning_rate=0.0, grad_norm=0.0, policy_loss=0.0, times={})
    assert metrics[f"entropy/{whose}_median"] == found.median_entropy
    other = settings(name, mask_truncated=not mask_truncated)
    assert product.step(examples, other, gate_of(other, H_WARM)).median_entropy != found.median_entropy


def test_gate_decisions_over_steps(product: Product, dense: Any) -> None:
    """Two warm-up steps; then temperature moves the entropies across the thresholds."""
    temperatures = [1.0, 0.9, 1.0, 0.5, 0.92, 1.1, 1.0, 0.4]
    for name in CONDITIONS:
        warmup = None if name == "grpo" else 2
        gate, memory = gate_of(DenseRecipe(condition=name, warmup_steps=warmup)), DenseGate()
        lams = []
        for k, temperature in enumerate(temperatures):
            recipe = DenseRecipe(condition=name, temperature=temperature, warmup_steps=warmup)
            batch = hard_batch(20 + k)
            if k == 1:
                batch = [replace(e, teacher_prompt_ids=None) for e in batch]  # no H, except to a student's gate
            expected = score_batch(dense, batch, recipe, memory)
            found = product.step(batch, recipe, gate, tokens_per_microbatch=400)
            check_scores(found, expected)
            lams.append(found.lam)
            if name != "grpo":
                assert (gate.h_warm is None) == (memory.h_warm is None)
                assert (gate.h_warm or 0.0) == pytest.approx(memory.h_warm or 0.0, rel=1e-6)
        if condition(name).gated:
            assert lams[0] == lams[1] == 0.0 and {0.0, 0.5} <= set(lams[3:])


IMPORTANCE_OF = {
    "none": corrected("truncated", "token"),
    "sequence": corrected("masked", "geometric") | {"importance_floor": 0.8, "importance_cap": 1.25},
    "batch": corrected("truncated", "sequence") | {"importance_cap": 0.3},
}  # by normalization


@pytest.mark.parametrize("normalization", ["none", "sequence", "batch"])
@pytest.mark.parametrize(
    ("updates", "epochs"), [(2, 1), (1, 2), (3, 2)], ids=["two_updates", "two_epochs", "three_updates_two_epochs"]
)
def test_several_updates_with_frozen_scores(
    updates: int, epochs: int, normalization: str, product: Product, dense: Any, examples: list[Example]
) -> None:
    """Scores, term and lambda are those from before the first update; the ratio is clipped, more tightly below."""
    recipe = settings(
        "antisd",
        updates=updates,
        epochs=epochs,
        term_normalization=normalization,
        temperature=0.7,
        clip_low=0.05,
        clip_high=0.1,
        **IMPORTANCE_OF[normalization],
        learning_rate=5e-3,
        weight_decay=0.1,
        beta2=0.95,
        epsilon=1e-4,
        clip_grad=0.5,
    )
    start = {n: p.detach().clone() for n, p in dense.named_parameters()}
    product.reload()
    found, expected = run_both(product, copy.deepcopy(dense), examples, recipe)
    product.reload()
    check_scores(found, expected)
    check_update(found, expected, tolerance=1e-4)
    check_importance(found, expected, recipe)
    assert found.plan.student_scoring and found.plan.head == "fused"
    assert len(found.weights) == len(expected.weights) == updates * epochs
    for k, wanted in enumerate(expected.weights):
        for name, weight in wanted.items():
            # Adam divides by the root of second moments that can be tiny.
            assert relative(found.weights[k][name] - start[name], weight - start[name]) < 5e-4, (k, name)
    assert expected.clipped[0] == 0 and sum(expected.clipped) > 0
    clipped = float(found.stats.columns.clipped.sum())
    if epochs == 1:
        assert clipped == sum(expected.clipped)
    else:
        assert max(expected.clipped) <= clipped <= sum(expected.clipped)
    assert all(found.stats.applied)


# Between the ratios of this batch: those of responses are nearer to 1 than those of tokens.
POLICY_LOSSES = {"gspo": {"clip_low": 0.005, "clip_high": 0.008}, "cispo": {"clip_low": 0.03, "clip_high": 0.04}}


@pytest.mark.parametrize(("aggregation", "tokens_per_microbatch"), [("token_mean", 64), ("sequence_mean", 10_000)])
@pytest.mark.parametrize("name", list(POLICY_LOSSES))
def test_several_updates_with_other_policy_losses(
    name: str, aggregation: str, tokens_per_microbatch: int, product: Product, dense: Any, examples: list[Example]
) -> None:
    recipe = settings(
        "antisd",
        policy_loss=name,
        **POLICY_LOSSES[name],
        aggregation=aggregation,
        updates=2,
        epochs=2,
        entropy_coefficient=0.1,
        mask_truncated=True,
        temperature=0.7,
        learning_rate=5e-3,
        epsilon=1e-4,
        clip_grad=0.5,
        **(corrected("truncated", "sequence") if aggregation == "token_mean" else {}),
    )
    product.reload()
    found, expected = run_both(
        product, copy.deepcopy(dense), examples, recipe, tokens_per_microbatch=tokens_per_microbatch
    )
    product.reload()
    check_update(found, expected, tolerance=1e-4)
    assert found.plan.head == ("two_phase" if name == "gspo" else "fused")
    assert expected.clipped[0] == 0 and min(expected.clipped[2:]) > 0, "the ratios move in the second epoch"
    tokens = sum(int(e.rollout.loss_mask.sum()) for e in examples if not e.rollout.truncated)
    assert max(expected.clipped) < tokens
    assert max(expected.clipped) <= float(found.stats.columns.clipped.sum()) <= sum(expected.clipped)


@pytest.mark.parametrize(("low", "high"), [(0.02, 100.0), (1.0, 0.02)])
def test_the_two_clips_are_separate(
    low: float, high: float, product: Product, dense: Any, examples: list[Example]
) -> None:
    recipe = settings(
        "sd", updates=1, epochs=2, clip_low=low, clip_high=high, learning_rate=5e-3, epsilon=1e-4, clip_grad=0.5
    )
    product.reload()
    found, expected = run_both(product, copy.deepcopy(dense), examples, recipe)
    product.reload()
    check_update(found, expected, tolerance=1e-4)
    assert expected.clipped[1] > 0
    assert found.stats.columns.clipped.sum() == expected.clipped[1]
    assert found.table is not None
    clipped = found.stats.columns.clipped.bool()
    positive = found.stats.columns.constants.advantage[clipped] > 0
    assert positive.all() if high < low else not positive.any()


def test_several_updates_need_scores(product: Product, examples: list[Example]) -> None:
    from asd_megatron.trainer import token_method
    from asd_megatron.trainer.updater import update
    from tests.trainer.product import RecordingOptimizer, method_of

    recipe = settings("grpo", updates=2)
    batch = product.batch(examples, recipe, 100)
    method = method_of(recipe)
    inputs = token_method.token_inputs(batch, method)
    with pytest.raises(ValueError, match="scoring pass of the student"):
        update(
            product.port,
            product.process_groups,
            RecordingOptimizer(product.port, recipe),
            batch,
            inputs,
            teacher=None,
            student=None,
            method=method,
            plan=product.step(examples, settings("grpo"), gate_of(settings("grpo"))).plan,
            lam=0.0,
            temperature=1.0,
        )


def test_nothing_to_learn_from_leaves_a_zero_gradient(product: Product, examples: list[Example]) -> None:
    """Every response truncated and masked: no denominator divides by 0."""
    batch = [replace(e, rollout=replace(e.rollout, finish_reason=FinishReason.LENGTH)) for e in examples[:4]]
    for aggregation in AGGREGATIONS:
        recipe = settings("no_gate", mask_truncated=True, aggregation=aggregation, constant_length=9)
        found = product.step(batch, recipe, gate_of(recipe))
        assert found.stats.losses == (0.0,) and found.stats.grad_norms == (0.0,) and found.median_entropy is None

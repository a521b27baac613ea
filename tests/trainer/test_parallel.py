"""Normalised terms, importance weights of whole responses, the token table and the supervised stage in several layouts:
equal to one process. Ranks that leave an update out do so together."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from asd_megatron.checks.cases import hard_batch
from asd_megatron.distributed.layout import Layout
from asd_megatron.observe.metrics import PerplexityReading
from asd_megatron.records import Example
from asd_megatron.trainer.optimizer import Optimizer
from tests.distributed.harness import run_ranks
from tests.models import everywhere
from tests.reference.dense import DensePerplexity, DenseRecipe
from tests.trainer.product import Product, RecordingOptimizer, gate_of, snapshot, strength_of
from tests.trainer.test_sft import examples as supervised_examples

LAYOUTS = {
    "cp2": Layout(context=2),
    "dp2": Layout(data=2),
    "tp2_sp": Layout(tensor=2, sequence_parallel=True),
    "pp2_vpp2": Layout(pipeline=2, virtual_pipeline=2),
}
RECIPES = {
    "sequence": DenseRecipe("no_gate", 0.7, term_normalization="sequence", term_clip=1.5),
    "batch": DenseRecipe("no_gate", 0.7, term_normalization="batch", aggregation="sequence_mean"),
    "student_sequence": DenseRecipe("no_teacher", term_normalization="sequence", warmup_steps=0),
    "two_updates": DenseRecipe(
        "antisd",
        0.7,
        term_normalization="batch",
        warmup_steps=0,
        updates=2,
        importance="truncated",
        importance_level="sequence",
        importance_cap=3.0,
    ),
    "gspo": DenseRecipe(
        "no_gate",
        0.7,
        policy_loss="gspo",
        clip_low=0.002,
        clip_high=0.002,
        aggregation="sequence_mean",
        epochs=2,
        learning_rate=5e-3,
        epsilon=1e-4,
        clip_grad=0.5,
        mask_truncated=True,
    ),
    "cispo_entropy": DenseRecipe(
        "no_gate",
        0.7,
        policy_loss="cispo",
        clip_low=1.0,
        clip_high=0.05,
        entropy_coefficient=0.2,
        epochs=2,
        learning_rate=5e-3,
        epsilon=1e-4,
    ),
    "exact": DenseRecipe("antisd", 0.7, warmup_steps=0, updates=2, divergence="jensen_shannon"),
    "exact_descent": DenseRecipe("sd", divergence="forward_kl", ascend=False),
    "truncated": DenseRecipe(
        "no_gate", 0.7, importance="truncated", importance_level="sequence", importance_cap=3.0, mask_truncated=True
    ),
    "perplexity": DenseRecipe(
        "antisd",
        0.7,
        perplexity=DensePerplexity(target=150.0, cutoff=1000.0, lambda_0=0.4),
        outlier_deviations=1.0,
        warmup_steps=1,
        term_normalization="demean",
        mask_truncated=True,
    ),
    "batch_perplexity": DenseRecipe(
        "no_gate",
        perplexity=DensePerplexity(target=50.0, cutoff=150.0, scope="batch", shift="negative"),
        warmup_steps=0,
        updates=2,
        composition="multiplicative_plain",
    ),
    "masked": DenseRecipe(
        "no_gate",
        0.7,
        term_normalization="sequence",
        importance="masked",
        importance_level="geometric",
        importance_cap=1.1,
        importance_floor=0.9,
    ),
    "ema_teacher": DenseRecipe(
        "no_gate", 0.7, teacher="ema", ema_rate=0.3, divergence="jensen_shannon", kl="k3", kl_coefficient=0.2
    ),
    "initial_teacher": DenseRecipe(
        "no_gate", 0.7, teacher="initial", term_normalization="sequence", kl="k1", kl_coefficient=0.2
    ),
}
Found = dict[str, dict[str, Any]]


def _with_an_engine(product: Product) -> list[Example]:
    """The hard batch, its log-probs those of an engine that differs from this model by half a nat a token."""
    recipe = DenseRecipe("grpo", 0.7)
    table = product.step(hard_batch(1), recipe, gate_of(recipe)).table
    assert table is not None
    noise = torch.Generator().manual_seed(2)
    out = []
    for e, s in zip(hard_batch(1), table.rows("student_logprobs"), strict=True):
        engine = s + 0.5 * torch.randn(len(s), generator=noise)
        out.append(replace(e, rollout=replace(e.rollout, logprobs=tuple(engine.tolist()))))
    return out


def _steps(product: Product, examples: list[Example]) -> Found:
    found: Found = {}
    for name, recipe in RECIPES.items():
        gate = gate_of(recipe, 0.5 if recipe.warmup_steps == 0 else None)
        if recipe.kl is not None:  # live weights that differ from both copies
            copies = product.keep_copies(recipe)
            product.load_others()
            copies.follow()
        strength = strength_of(recipe, product.process_groups, gate)
        if recipe.outlier_deviations is not None:  # the warm-up step that measures u's deviation
            product.step(hard_batch(2), recipe, strength)
        before = [p.clone() for chunk in product.port.chunks for p in chunk.parameters()]
        step = product.step(examples, recipe, strength, tokens_per_microbatch=160)
        after = [p for chunk in product.port.chunks for p in chunk.parameters()]
        table: dict[str, Tensor] = {} if step.table is None else {**step.table.columns, "offsets": step.table.offsets}
        found[name] = {
            "losses": step.stats.losses,
            "entropy": step.median_entropy,
            "lambda": step.lam,
            "lambdas": step.reading.lambdas.tolist() if isinstance(step.reading, PerplexityReading) else [],
            "limit": strength.outlier_limit,
            "table": table,
            "gradients": step.gradients,
            "untouched": all(map(torch.equal, before, after)),
        }
        if recipe.kl is not None or recipe.learning_rate is not None:
            product.reload()
    optimizer = RecordingOptimizer(product.port, DenseRecipe())
    stats = product.supervised_step(supervised_examples(1), optimizer)
    found["supervised"] = {"losses": [stats.loss], "gradients": optimizer.gradients}
    return found


def _update_with_a_bad_number(product: Product, *, distributed: bool = False) -> dict[str, Any]:
    """A gradient that is not finite in the last rank's part alone."""
    recipe = DenseRecipe(learning_rate=1e-2)
    optimizer = RecordingOptimizer(product.port, recipe, distributed=distributed)
    before = snapshot(everywhere.weights(product.port).items())
    optimizer.zero_grad()
    if product.process_groups.world.rank() == product.process_groups.world.size() - 1:
        buffer = product.port.chunks[0].buffers[0].grad_data
        buffer[len(buffer) // 2 if distributed else 0] = math.nan  # the second half is this rank's own shard
    result = Optimizer.step(optimizer)  # without the recording, which sharded gradients do not allow
    after = snapshot(everywhere.weights(product.port).items())
    return {"applied": result.applied, "untouched": all(torch.equal(after[n], w) for n, w in before.items())}


def _on_rank(rank: int, folder: Path, examples: list[Example]) -> dict[str, Found]:
    found = {name: _steps(Product(folder, layout), examples) for name, layout in LAYOUTS.items()}
    bad: dict[str, Any] = {"pipeline": _update_with_a_bad_number(Product(folder, Layout(pipeline=2)))}
    sharded = Product(folder, Layout(data=2), distributed_optimizer=True)
    bad["sharded"] = _update_with_a_bad_number(sharded, distributed=True)
    found["bad"] = bad
    return found


@pytest.fixture(scope="module")
def examples(product: Product) -> list[Example]:
    return _with_an_engine(product)


@pytest.fixture(scope="module")
def ranks(tiny_folder: Path, examples: list[Example]) -> list[dict[str, Found]]:
    return run_ranks(_on_rank, 2, tiny_folder, examples, timeout=200, init=False)


@pytest.fixture(scope="module")
def alone(product: Product, examples: list[Example]) -> Found:
    return _steps(product, examples)


def check_update(found: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-5) -> None:
    assert found["losses"] == pytest.approx(expected["losses"], rel=tolerance, abs=tolerance / 10)
    for gradients, wanted in zip(found["gradients"], expected["gradients"], strict=True):
        assert set(gradients) == set(wanted)
        for key, gradient in wanted.items():
            assert (gradients[key] - gradient).abs().max() < tolerance * gradient.abs().max(), key


@pytest.mark.parametrize("name", list(RECIPES))
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_two_ranks_equal_one(layout: str, name: str, ranks: list[dict[str, Found]], alone: Found) -> None:
    expected = alone[name]
    for rank in ranks:
        found = rank[layout][name]
        if RECIPES[name].perplexity is None:
            assert found["lambda"] == expected["lambda"] == 0.5
            assert found["entropy"] == pytest.approx(expected["entropy"], rel=1e-6)
        first = ranks[0][layout][name]
        assert (found["lambdas"], str(found["limit"])) == (first["lambdas"], str(first["limit"]))  # to the last bit
        assert found["lambdas"] == pytest.approx(expected["lambdas"], rel=1e-4, abs=1e-7)
        assert (found["limit"] or 0.0) == pytest.approx(expected["limit"] or 0.0, rel=1e-5)
        trained = RECIPES[name].learning_rate is not None  # in the others the live weights are back, bit for bit
        assert found["untouched"] != trained
        check_update(found, expected, 1e-4 if trained else 1e-5)
    table = ranks[0][layout][name]["table"]
    assert ranks[1][layout][name]["table"] == {}  # the table goes to global rank 0 alone
    assert set(table) == set(expected["table"])
    for key, column in expected["table"].items():
        if column.is_floating_point():
            assert (table[key] - column).abs().max() < 1e-5 * column.abs().max() + 1e-9, key
        else:
            assert torch.equal(table[key], column), key


def test_some_responses_are_clipped_and_some_weights_cut(alone: Found) -> None:
    for name in ("gspo", "cispo_entropy"):
        table = alone[name]["table"]
        assert 0.01 < table["clipped"][table["loss_mask"]].mean() < 0.95, name


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe.importance != "none"])
def test_some_importance_weights_are_cut(name: str, alone: Found) -> None:
    table = alone[name]["table"]
    affected = table["importance_affected"][table["loss_mask"]]
    assert 0.05 < affected.mean() < 0.95


def test_lambdas_differ_and_outliers_are_found(alone: Found) -> None:
    assert len(set(alone["perplexity"]["lambdas"])) > 4 and alone["perplexity"]["limit"] > 0
    u, acts = alone["perplexity"]["table"]["pmi"], alone["perplexity"]["table"]["has_context"]
    assert 0.05 < (u[acts].abs() > alone["perplexity"]["limit"]).double().mean() < 0.9
    assert {0.0} < set(alone["batch_perplexity"]["lambdas"]) and len(set(alone["batch_perplexity"]["lambdas"])) == 2


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_supervised(layout: str, ranks: list[dict[str, Found]], alone: Found) -> None:
    for rank in ranks:
        check_update(rank[layout]["supervised"], alone["supervised"])


@pytest.mark.parametrize("where", ["pipeline", "sharded"])
def test_ranks_leave_an_update_out_together(where: str, ranks: list[dict[str, Found]]) -> None:
    assert [rank["bad"][where] for rank in ranks] == [{"applied": False, "untouched": True}] * 2

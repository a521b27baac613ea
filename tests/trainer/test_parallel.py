"""A normalised term and the token table in several layouts: equal to one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from asd_megatron.checks.cases import hard_batch
from asd_megatron.distributed.layout import Layout
from tests.distributed.harness import run_ranks
from tests.reference.dense import DenseRecipe
from tests.trainer.product import Product, gate_of

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
    "two_updates": DenseRecipe("antisd", term_normalization="batch", warmup_steps=0, updates=2),
}
Found = dict[str, dict[str, Any]]


def _steps(product: Product) -> Found:
    found: Found = {}
    for name, recipe in RECIPES.items():
        gate = gate_of(recipe, 0.5 if recipe.warmup_steps == 0 else None)
        step = product.step(hard_batch(1), recipe, gate, tokens_per_microbatch=96)
        table: dict[str, Tensor] = {} if step.table is None else {**step.table.columns, "offsets": step.table.offsets}
        found[name] = {
            "losses": step.stats.losses,
            "entropy": step.median_entropy,
            "lambda": step.lam,
            "table": table,
            "gradients": step.gradients,
        }
    return found


def _on_rank(rank: int, folder: Path) -> dict[str, Found]:
    torch.set_num_threads(1)
    return {name: _steps(Product(folder, layout)) for name, layout in LAYOUTS.items()}


@pytest.fixture(scope="module")
def ranks(tiny_folder: Path) -> list[dict[str, Found]]:
    return run_ranks(_on_rank, 2, tiny_folder, timeout=200, init=False)


@pytest.fixture(scope="module")
def alone(product: Product) -> Found:
    return _steps(product)


@pytest.mark.parametrize("name", list(RECIPES))
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_two_ranks_equal_one(layout: str, name: str, ranks: list[dict[str, Found]], alone: Found) -> None:
    expected = alone[name]
    for rank in ranks:
        found = rank[layout][name]
        assert found["lambda"] == expected["lambda"] == 0.5
        assert found["entropy"] == pytest.approx(expected["entropy"], rel=1e-6)
        assert found["losses"] == pytest.approx(expected["losses"], abs=1e-6)
        for gradients, wanted in zip(found["gradients"], expected["gradients"], strict=True):
            assert set(gradients) == set(wanted)
            for key, gradient in wanted.items():
                assert (gradients[key] - gradient).abs().max() < 1e-5 * gradient.abs().max(), key
    table = ranks[0][layout][name]["table"]
    assert ranks[1][layout][name]["table"] == {}  # the table goes to global rank 0 alone
    assert set(table) == set(expected["table"])
    for key, column in expected["table"].items():
        if column.is_floating_point():
            assert (table[key] - column).abs().max() < 1e-5 * column.abs().max() + 1e-9, key
        else:
            assert torch.equal(table[key], column), key

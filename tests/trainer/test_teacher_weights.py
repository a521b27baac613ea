"""A teacher of the initial weights or of their moving average, and the KL penalty to the initial weights, over several
steps: the product (float32) against the dense float64 reference. The exchange of weights is exact."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from asd_megatron.checks.cases import hard_batch
from asd_megatron.models import weight_copies
from asd_megatron.records import Example
from asd_megatron.trainer.optimizer import Optimizer, StepResult
from tests.models import everywhere
from tests.reference.dense import DenseGate, DenseModels, DenseRecipe, dense_update
from tests.trainer.product import Product, gate_of
from tests.trainer.test_against_reference import check_update, relative

STEPS = 2
MOVING = DenseRecipe("no_gate", 0.7, learning_rate=5e-3, epsilon=1e-4, clip_grad=0.5, beta2=0.95)
CASES: dict[str, dict[str, Any]] = {
    "initial": {"teacher": "initial", "updates": 2},
    "ema_exact": {"teacher": "ema", "ema_rate": 0.4, "divergence": "jensen_shannon", "ascend": False},
    "k1": {"kl": "k1", "updates": 2, "importance": "truncated", "importance_cap": 1.1},
    "k3": {"condition": "grpo", "kl": "k3", "aggregation": "sequence_mean", "epochs": 2},
    "both": {
        "teacher": "ema",
        "ema_rate": 0.4,
        "divergence": "forward_kl",
        "ascend": False,
        "kl": "k2",
        "updates": 2,
        "importance": "truncated",
        "importance_cap": 1.1,
    },
}


@pytest.fixture(autouse=True)
def weights_as_loaded(product: Product) -> Iterator[None]:
    yield
    product.reload()


def with_an_engine(examples: list[Example]) -> list[Example]:
    noise = torch.Generator().manual_seed(5)
    return [
        replace(e, rollout=replace(e.rollout, logprobs=tuple((torch.tensor(e.rollout.logprobs) + 0.3 * n).tolist())))
        for e in examples
        for n in [torch.randn(len(e.rollout.logprobs), generator=noise)]
    ]


@pytest.mark.parametrize("name", list(CASES))
def test_several_steps(name: str, product: Product, dense: Any) -> None:
    recipe = replace(MOVING, kl_coefficient=0.3, **CASES[name])
    model = copy.deepcopy(dense)
    models = DenseModels(model)
    product.reload()
    copies = product.keep_copies(recipe)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    live_pointers = [p.data_ptr() for chunk in product.port.chunks for p in chunk.parameters()]
    for k in range(STEPS):
        examples = with_an_engine(hard_batch(30 + k))
        found = product.step(examples, recipe, gate_of(recipe))
        expected = dense_update(model, examples, recipe, DenseGate(), models=models)
        check_update(found, expected, tolerance=1e-3 if k else 1e-4)
        assert found.table is not None
        if recipe.kl is not None:
            assert relative(found.table["reference_logprobs"].double(), torch.cat(expected.reference_logprobs)) < 1e-4
        for n, weight in expected.weights[-1].items():
            assert relative(found.weights[-1][n] - start[n], weight - start[n]) < 2e-3, (k, n)
    for copy_name, reference in (("initial", models.initial), ("ema", models.ema)):
        with copies.in_place(copy_name):  # type: ignore[arg-type]
            inside = {n: w.double() for n, w in everywhere.weights(product.port).items()}
        for n, p in reference.named_parameters():
            moved = 0.0 if copy_name == "initial" else float((p - start[n]).detach().abs().max())
            tolerance = 5e-3 * moved + 1e-7 * (copy_name == "ema")  # the initial weights are exact
            assert float((inside[n] - p).detach().abs().max()) <= tolerance, (copy_name, n)
    assert live_pointers == [p.data_ptr() for chunk in product.port.chunks for p in chunk.parameters()]


@pytest.mark.parametrize("name", list(CASES))
def test_the_choice_changes_the_second_step(name: str, product: Product) -> None:
    """The comparisons above are not between two no-ops."""
    recipe = replace(MOVING, kl_coefficient=0.3, **CASES[name])
    gradients = []
    for used in (recipe, replace(recipe, teacher="live", kl=None)):
        product.reload()
        product.keep_copies(recipe)
        product.step(hard_batch(30), replace(MOVING, condition="grpo"), gate_of(DenseRecipe("grpo")))
        gradients.append(product.step(hard_batch(31), used, gate_of(used)).gradients[0])
    assert max(relative(gradients[0][n], g) for n, g in gradients[1].items()) > 1e-3


def test_the_exchange_is_exact_whatever_happens_inside(product: Product, monkeypatch: pytest.MonkeyPatch) -> None:
    copies = product.keep_copies(DenseRecipe(ema_rate=0.25))
    start = [p.clone() for p in parameters(product)]
    product.load_others()
    copies.follow()
    live = [p.clone() for p in parameters(product)]

    with copies.in_place("initial"):
        assert all(map(torch.equal, parameters(product), start))
        with pytest.raises(RuntimeError, match="already"), copies.in_place("ema"):
            pass
        assert all(map(torch.equal, parameters(product), start))
    assert all(map(torch.equal, parameters(product), live))

    with pytest.raises(KeyboardInterrupt), copies.in_place("ema"):
        for p, a, b in zip(parameters(product), start, live, strict=True):
            torch.testing.assert_close(p, 0.75 * a + 0.25 * b)
        raise KeyboardInterrupt
    assert all(map(torch.equal, parameters(product), live))

    calls = 0

    def fails(targets: list[Tensor], sources: list[Tensor]) -> None:
        """The second exchange breaks off in the middle."""
        nonlocal calls
        calls += 1
        for i, (target, source) in enumerate(zip(targets, sources, strict=True)):
            if calls == 2 and i == len(targets) // 2:
                raise RuntimeError("out of memory")
            with torch.no_grad():
                target.copy_(source)

    monkeypatch.setattr(weight_copies, "_copy_all", fails)
    with pytest.raises(RuntimeError, match="out of memory"), copies.in_place("initial"):
        pass
    assert calls == 3 and all(map(torch.equal, parameters(product), live))


def parameters(product: Product) -> list[Tensor]:
    return [p for chunk in product.port.chunks for p in chunk.parameters()]


def test_a_failed_scoring_pass_puts_the_live_weights_back(product: Product, monkeypatch: pytest.MonkeyPatch) -> None:
    from asd_megatron.trainer import passes

    recipe = replace(MOVING, teacher="initial", learning_rate=None)
    product.keep_copies(recipe)
    product.load_others()
    live = [p.clone() for p in parameters(product)]

    def fails(*args: Any, **options: Any) -> None:
        assert not all(map(torch.equal, parameters(product), live))
        raise ValueError("stopped")

    monkeypatch.setattr(passes, "score", fails)
    with pytest.raises(ValueError, match="stopped"):
        product.step(hard_batch(1), recipe, gate_of(recipe))
    assert all(map(torch.equal, parameters(product), live))


def test_a_skipped_update_does_not_move_the_average(product: Product, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two updates a batch the first is applied and the second is not."""
    recipe = replace(MOVING, teacher="ema", ema_rate=0.25, updates=2)
    copies = product.keep_copies(recipe)
    start = [p.clone() for p in parameters(product)]
    after_first: list[Tensor] = []

    def step(optimizer: Optimizer, *, loss: float = 0.0) -> StepResult:
        if after_first:
            return StepResult(float("nan"), False)
        with torch.no_grad():
            for p in parameters(product):
                p.add_(1.0)
        after_first.extend(p.clone() for p in parameters(product))
        return StepResult(1.0, True)

    monkeypatch.setattr(Optimizer, "step", step)
    assert product.step(hard_batch(1), recipe, gate_of(recipe)).stats.applied == (True, False)
    with copies.in_place("ema"):
        for p, a, b in zip(parameters(product), start, after_first, strict=True):
            torch.testing.assert_close(p, 0.75 * a + 0.25 * b)


def test_a_plan_without_its_copies_is_refused(product: Product) -> None:
    for recipe in (replace(MOVING, teacher="initial"), replace(MOVING, kl="k2", kl_coefficient=0.1)):
        with pytest.raises(ValueError, match="no copies were given"):
            product.step(hard_batch(1), recipe, gate_of(recipe))

"""The learning rate's course, clipping, and an update that must leave no trace."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from asd_megatron.trainer import handover
from asd_megatron.trainer.optimizer import Optimizer
from tests.reference.dense import DenseAdam, DenseRecipe, adamw
from tests.trainer.product import Product, snapshot


def make(product: Product, **over: Any) -> Optimizer:
    settings = dict(
        learning_rate=1e-2,
        min_learning_rate=0.0,
        schedule="constant",
        warmup_steps=0,
        total_steps=8,
        weight_decay=0.1,
        beta1=0.9,
        beta2=0.95,
        epsilon=1e-4,
        clip_grad=1.0,
        distributed=False,
    )
    return Optimizer(product.port, **{**settings, **over})


def fill_gradients(product: Product, seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    """Random gradients where the backward pass leaves them; returned by Hugging Face name."""
    g = torch.Generator().manual_seed(seed)
    for chunk in product.port.chunks:
        for parameter in chunk.parameters():
            parameter.main_grad.copy_(scale * torch.randn(parameter.shape, generator=g))
    return snapshot(product.port.export_gradients())


def rates(product: Product, steps: int, **settings: Any) -> list[float]:
    """The learning rate of each of `steps` updates."""
    optimizer = make(product, learning_rate=1.0, total_steps=steps, **settings)
    found = []
    for _ in range(steps):
        found.append(optimizer.learning_rate)
        optimizer.zero_grad()
        optimizer.scheduler.step(1)
    return found


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [1, 1, 1, 1]),
        ({"warmup_steps": 2}, [0.5, 1, 1, 1]),
        ({"schedule": "linear"}, [1, 0.75, 0.5, 0.25]),
        ({"schedule": "linear", "min_learning_rate": 0.2}, [1, 0.8, 0.6, 0.4]),
        ({"schedule": "linear", "warmup_steps": 1}, [1, 0.75, 0.5, 0.25]),
        ({"schedule": "linear", "warmup_steps": 2}, [0.5, 1, 2 / 3, 1 / 3]),
        ({"schedule": "cosine"}, [(1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)]),
        (
            {"schedule": "cosine", "warmup_steps": 2, "min_learning_rate": 0.1},
            [0.5, 1, 0.1 + 0.9 * 0.75, 0.1 + 0.9 * 0.25],
        ),
        ({"schedule": "cosine", "warmup_steps": 6}, [1 / 6, 2 / 6, 3 / 6, 4 / 6]),
    ],
    ids=lambda x: "-".join(f"{k}_{v}" for k, v in x.items()) or "constant" if isinstance(x, dict) else "",
)
def test_the_learning_rates_course(settings: dict[str, Any], expected: list[float], product: Product) -> None:
    assert rates(product, 4, **settings) == pytest.approx(expected, abs=1e-12)


def test_one_step_in_all(product: Product) -> None:
    for schedule in ("constant", "linear", "cosine"):
        assert rates(product, 1, schedule=schedule) == [1.0]
        assert rates(product, 1, schedule=schedule, warmup_steps=1) == [1.0]


@pytest.mark.parametrize("clip_grad", [0.5, 0.0])
def test_adamw_with_clipping_equals_the_reference(clip_grad: float, product: Product) -> None:
    """The learning rate rises meanwhile; matrices decay, norms do not."""
    product.reload()
    optimizer = make(product, clip_grad=clip_grad, warmup_steps=3)
    recipe = DenseRecipe(weight_decay=0.1, beta2=0.95, epsilon=1e-4)
    weights, adam = snapshot(product.port.export()), DenseAdam()
    for step in range(1, 4):
        optimizer.zero_grad()
        gradients = fill_gradients(product, step, scale=0.1)
        norm = math.sqrt(sum(float((g * g).sum()) for g in gradients.values()))
        result = optimizer.step()
        assert result.applied and result.grad_norm == pytest.approx(norm, rel=1e-6) and norm > 2 * 0.5
        scale = clip_grad / (norm + 1e-6) if clip_grad else 1.0
        adamw(weights, {n: scale * g for n, g in gradients.items()}, recipe, adam, 1e-2 * step / 3)
    for name, weight in snapshot(product.port.export()).items():
        torch.testing.assert_close(weight, weights[name], rtol=1e-5, atol=1e-6)
    product.reload()


def state(optimizer: Optimizer) -> list[Tensor]:
    """First and second moments and Adam's step counts."""
    found = []
    for part in getattr(optimizer.megatron, "chained_optimizers", [optimizer.megatron]):
        for values in part.optimizer.state.values():
            found += [torch.as_tensor(values[k]).clone() for k in sorted(values)]
    return found


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_leaves_no_trace(bad: float, product: Product) -> None:
    """Weights and moments stay bit for bit, the schedule continues, and so does the next update as if nothing was."""
    product.reload()
    optimizer = make(product, schedule="linear")
    fill_gradients(product, 1)
    optimizer.step()
    weights, moments = snapshot(product.port.export()), copy.deepcopy(state(optimizer))
    assert moments
    optimizer.zero_grad()
    fill_gradients(product, 2)
    next(iter(product.port.chunks[0].parameters())).main_grad.view(-1)[3] = bad
    result = optimizer.step()
    assert not result.applied and not math.isfinite(result.grad_norm)
    check_untouched(product, optimizer, weights, moments)
    assert optimizer.learning_rate == pytest.approx(1e-2 * 6 / 8)
    optimizer.zero_grad()
    fill_gradients(product, 3)
    result = optimizer.step()
    assert result.applied and math.isfinite(result.grad_norm)
    assert all(torch.isfinite(w).all() for w in snapshot(product.port.export()).values())
    assert not all(torch.equal(a, b) for a, b in zip(state(optimizer), moments, strict=True))
    product.reload()


def test_a_loss_that_is_not_finite_is_left_out_too(product: Product) -> None:
    product.reload()
    optimizer = make(product)
    fill_gradients(product, 1)
    weights, moments = snapshot(product.port.export()), copy.deepcopy(state(optimizer))
    result = optimizer.step(loss=math.nan)
    assert not result.applied and math.isfinite(result.grad_norm)
    check_untouched(product, optimizer, weights, moments)


def check_untouched(product: Product, optimizer: Optimizer, weights: dict[str, Tensor], moments: list[Tensor]) -> None:
    after = snapshot(product.port.export())
    assert all(torch.equal(after[name], weight) for name, weight in weights.items())
    assert all(torch.equal(a, b) for a, b in zip(state(optimizer), moments, strict=True))


def test_offloaded_memory_is_free_and_comes_back_with_its_contents(
    product: Product, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host plays the device. Host memory in blocks of 64 bytes: most tensors lie over several."""
    product.reload()
    monkeypatch.setattr(handover, "BLOCK_BYTES", 64)
    optimizer = make(product)
    fill_gradients(product, seed=1)
    assert optimizer.step().applied
    weights, moments = snapshot(product.port.export()), copy.deepcopy(state(optimizer))
    own = list(optimizer._own_tensors())
    buffers = [buffer.grad_data for chunk in product.port.chunks for buffer in chunk.buffers]
    expected = [tensor.untyped_storage().nbytes() for tensor in (*own, *buffers)]
    optimizer.offload()
    assert all(tensor.untyped_storage().nbytes() == 0 for tensor in (*own, *buffers))
    kept = list(optimizer._host._blocks)
    optimizer.reload()
    assert [tensor.untyped_storage().nbytes() for tensor in (*own, *buffers)] == expected
    check_untouched(product, optimizer, weights, moments)
    fill_gradients(product, seed=2)
    assert optimizer.step().applied
    moments = copy.deepcopy(state(optimizer))
    optimizer.offload()
    optimizer.reload()
    assert all(a is b for a, b in zip(kept, optimizer._host._blocks, strict=True))  # taken once
    assert all(torch.equal(a, b) for a, b in zip(state(optimizer), moments, strict=True))
    product.reload()

"""The supervised stage: weighted cross-entropy, whatever the micro-batches (other layouts: test_parallel)."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from asd_megatron.checks.cases import VOCABULARY
from asd_megatron.data.sft import SftExample
from asd_megatron.trainer.sft import SupervisedStats
from tests.reference.dense import DenseRecipe, score
from tests.trainer.product import Product, RecordingOptimizer


def examples(seed: int, count: int = 9) -> list[SftExample]:
    """Very unequal lengths; weights of 0, fractions and more than 1."""
    rng = random.Random(seed)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(rng.randrange(2, VOCABULARY) for _ in range(n))

    out = []
    for n in [1, 30, 2, 9, 5, 1, 17, 3, 8][:count]:
        weights = tuple(rng.choice([0.0, 0.25, 1.0, 1.0, 2.0]) for _ in range(n))
        out.append(SftExample(ids(rng.randint(1, 12)), ids(n), weights))
    return out


def step(
    product: Product, batch: list[SftExample], tokens_per_microbatch: int = 64
) -> tuple[SupervisedStats, dict[str, torch.Tensor]]:
    optimizer = RecordingOptimizer(product.port, DenseRecipe())
    stats = product.supervised_step(batch, optimizer, tokens_per_microbatch=tokens_per_microbatch)
    return stats, optimizer.gradients[0]


@pytest.mark.parametrize("tokens_per_microbatch", [1, 64, 100_000])
def test_equals_dense_cross_entropy(tokens_per_microbatch: int, product: Product, dense: Any) -> None:
    batch = examples(1)
    stats, gradients = step(product, batch, tokens_per_microbatch)
    dense.zero_grad()
    total = sum(sum(e.loss_weights) for e in batch)
    loss = torch.zeros((), dtype=torch.float64)
    for e in batch:
        [(logprobs, _)] = score(dense, [e.prompt_ids], [e.response_ids], 1.0)
        loss = loss - (torch.tensor(e.loss_weights, dtype=torch.float64) * logprobs).sum() / total
    loss.backward()
    assert stats.loss == pytest.approx(loss.item(), rel=1e-6)
    assert stats.tokens == sum(len(e.response_ids) for e in batch) and stats.applied
    assert set(gradients) == {n for n, _ in dense.named_parameters()}
    for name, parameter in dense.named_parameters():
        assert (gradients[name] - parameter.grad).abs().max() < 1e-5 * parameter.grad.abs().max(), name
    dense.zero_grad()


def test_weights_of_zero_leave_tokens_out(product: Product) -> None:
    """A response whose tokens all weigh 0 changes nothing; scaling all weights does not either."""
    batch = examples(2)
    silent = SftExample((5, 6), (7, 8, 9), (0.0, 0.0, 0.0))
    doubled = [SftExample(e.prompt_ids, e.response_ids, tuple(2 * w for w in e.loss_weights)) for e in batch]
    stats, gradients = step(product, batch)
    for other in ([*batch, silent], doubled):
        same, found = step(product, other)
        assert same.loss == pytest.approx(stats.loss, rel=1e-6)
        for name, gradient in gradients.items():
            assert (found[name] - gradient).abs().max() < 1e-5 * gradient.abs().max(), name


def test_nothing_to_learn(product: Product) -> None:
    with pytest.raises(ValueError, match="no response token of this batch has a positive loss weight"):
        step(product, [SftExample((5,), (6, 7), (0.0, 0.0))])


def test_it_learns(product: Product) -> None:
    batch = examples(3, count=4)
    product.reload()
    recipe = DenseRecipe(learning_rate=1e-2, epsilon=1e-6, weight_decay=0.0)
    optimizer = RecordingOptimizer(product.port, recipe)
    losses = [product.supervised_step(batch, optimizer).loss for _ in range(8)]
    product.reload()
    assert losses[-1] < 0.5 * losses[0]

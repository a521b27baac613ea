"""The rule for spikes of the gradient norm: when there is a limit, what is above it, and what becomes of the update."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from asd_megatron.trainer.spikes import FEWEST, WINDOW, SpikeRule, spike_limit
from tests.trainer.product import Product
from tests.trainer.test_optimizer import fill_gradients, make, snapshot, state


def test_the_limit_is_a_multiple_of_a_quantile_that_few_spikes_do_not_move() -> None:
    ordinary = [1 + 0.01 * i for i in range(18)]
    assert spike_limit([*ordinary, 1.0], 2.0) is None  # 19 norms
    assert spike_limit([*ordinary, 50.0, 70.0], 2.0) == 2 * max(ordinary)
    rule = SpikeRule("skip", 3.0)
    norms = [1.0] * FEWEST + [3.0, 3.1, 0.0, 1.0]
    assert [rule.exceeds(norm) for norm in norms] == [None] * FEWEST + [None, 3.0, None, None]
    assert [spike.norm for spike in rule.take()] == [3.1] and rule.take() == []


def test_norms_at_a_new_level_and_zeros() -> None:
    """A level that rises tenfold is reported for a tenth of the window; batches without a signal change nothing."""
    rule = SpikeRule("clip", 3.0)
    for _ in range(WINDOW):
        rule.exceeds(1.0)
        rule.exceeds(0.0)
    reported = [rule.exceeds(10.0) is not None for _ in range(WINDOW)]
    assert reported == sorted(reported, reverse=True) and sum(reported) == WINDOW // 10 + 1
    again = SpikeRule("clip", 3.0)
    again.load_state_dict(json.loads(json.dumps(rule.state_dict())))
    assert again.limit == rule.limit == 30.0


@pytest.mark.parametrize("action", ["skip", "clip"])
def test_what_becomes_of_a_spike(action: str, product: Product) -> None:
    """Skipped, it leaves no trace in weights and moments. Clipped, it acts like the same gradient scaled to the limit,
    also without `clip_grad`."""
    product.reload()
    optimizer = make(product, clip_grad=0.0, grad_spike=action, grad_spike_factor=2.0)
    for step in range(FEWEST):
        fill_gradients(product, step, scale=0.01)
        usual = optimizer.step().grad_norm
    assert optimizer.spikes is not None and optimizer.spikes.take() == []
    limit = optimizer.spikes.limit
    assert limit == pytest.approx(2 * usual, rel=0.2)
    weights, moments = snapshot(product.port.export()), copy.deepcopy(state(optimizer))
    optimizer.zero_grad()
    gradients = fill_gradients(product, 99, scale=1.0)
    result = optimizer.step()
    assert optimizer.spikes.take() == [(result.grad_norm, limit)]
    assert result.applied == (action == "clip")
    after = state(optimizer)
    if action == "skip":
        assert all(torch.equal(a, b) for a, b in zip(moments, after, strict=True))
        assert all(torch.equal(tensor, weights[name]) for name, tensor in snapshot(product.port.export()).items())
        return
    del gradients
    scaled = [a - 0.9 * b for a, b in zip(after, moments, strict=True) if a.dim()][0::2]  # 0.1 * what Adam was given
    norm = sum(float(tensor.double().square().sum()) for tensor in scaled) ** 0.5 / 0.1
    assert norm == pytest.approx(limit, rel=1e-3)
    product.reload()

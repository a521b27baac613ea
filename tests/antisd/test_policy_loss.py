"""The clipped loss, its weights and the importance correction."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from asd_megatron.antisd import (
    AggregationError,
    cispo_policy_loss,
    clipped_policy_loss,
    entropy_bonus,
    mean_log_ratio,
    ratio_statistics,
    sequence_policy_loss,
    token_weights,
)
from asd_megatron.errors import UserError

LENGTHS = [3, 11, 1, 0, 6, 9]
AGGREGATIONS = ["token_mean", "sequence_mean", "constant_length"]


def batch(seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    n = sum(LENGTHS)
    mask = torch.rand(n, generator=g) < 0.8
    mask[-9:] = False  # one rollout without any loss token
    return {
        "segment": torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)),
        "mask": mask,
        "old": -torch.rand(n, dtype=torch.float64, generator=g) * 3,
        "new": -torch.rand(n, dtype=torch.float64, generator=g) * 3,
        "advantage": torch.randn(n, dtype=torch.float64, generator=g),
    }


def weights(b: dict[str, Tensor], aggregation: str, rows: Tensor | None = None, **options: object) -> Tensor:
    keep = torch.ones_like(b["mask"]) if rows is None else rows
    tokens = int(b["mask"].sum())
    sequences = len(b["segment"][b["mask"]].unique())
    return token_weights(
        b["mask"][keep],
        b["segment"][keep],
        aggregation=aggregation,
        total_tokens=tokens,
        total_sequences=sequences,
        constant_length=20,
        dtype=torch.float64,
        **options,  # type: ignore[arg-type]
    )


@given(st.integers(0, 2**31))
def test_aggregations_by_hand(seed: int) -> None:
    b = batch(seed)
    x = b["advantage"]
    rows = [x[(b["segment"] == k) & b["mask"]] for k in range(len(LENGTHS))]
    rows = [r for r in rows if len(r)]
    torch.testing.assert_close((weights(b, "token_mean") * x).sum(), torch.cat(rows).mean())
    torch.testing.assert_close((weights(b, "sequence_mean") * x).sum(), torch.stack([r.mean() for r in rows]).mean())
    torch.testing.assert_close(
        (weights(b, "constant_length") * x).sum(), torch.stack([r.sum() / 20 for r in rows]).mean()
    )


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@settings(max_examples=20)
@given(st.integers(0, 2**31), st.integers(1, 4))
def test_loss_and_gradient_do_not_depend_on_the_split(aggregation: str, seed: int, parts: int) -> None:
    """Tokens dealt to micro-batches at random, rollouts torn apart as context parallelism does."""
    b = batch(seed)
    new = b["new"].clone().requires_grad_()
    whole, clipped = clipped_policy_loss(new, b["old"], b["advantage"], weights(b, aggregation), 0.2, 0.3)
    (gradient,) = torch.autograd.grad(whole, new)
    owner = torch.randint(parts + 1, new.shape, generator=torch.Generator().manual_seed(seed))  # some may be empty
    lengths = torch.bincount(b["segment"][b["mask"]], minlength=len(LENGTHS))
    total = torch.zeros((), dtype=torch.float64)
    count = 0
    for p in range(parts + 1):
        rows = owner == p
        w = weights(b, aggregation, rows, lengths=lengths)
        part, c = clipped_policy_loss(new[rows], b["old"][rows], b["advantage"][rows], w, 0.2, 0.3)
        total, count = total + part, count + int(c.sum())
    (split,) = torch.autograd.grad(total, new)
    torch.testing.assert_close(total, whole)
    torch.testing.assert_close(split, gradient)
    assert count == int(clipped.sum())


def test_weights_of_a_batch_without_tokens() -> None:
    empty, none = torch.zeros(0, dtype=torch.bool), torch.zeros(0, dtype=torch.int64)
    masked, zeros = torch.zeros(3, dtype=torch.bool), torch.zeros(3, dtype=torch.int64)
    for aggregation in AGGREGATIONS:
        for m, s in ((empty, none), (masked, zeros)):
            w = token_weights(m, s, aggregation=aggregation, total_tokens=0, total_sequences=0, constant_length=5)
            assert w.tolist() == [0.0] * len(m) and w.dtype == torch.float32


def test_refused_aggregations() -> None:
    mask, segment = torch.ones(2, dtype=torch.bool), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(AggregationError, match="choose token_mean"):
        token_weights(mask, segment, aggregation="mean", total_tokens=2, total_sequences=1)
    with pytest.raises(UserError, match="algorithm.constant_length"):
        token_weights(mask, segment, aggregation="constant_length", total_tokens=2, total_sequences=1)


@given(st.floats(-3, 3), st.floats(-2, 2, allow_subnormal=False), st.floats(0, 0.9), st.floats(0, 3))
def test_one_token_against_the_formula(log_ratio: float, advantage: float, low: float, high: float) -> None:
    new = torch.tensor([log_ratio - 1.0], dtype=torch.float64, requires_grad=True)
    old = torch.full_like(new, -1.0)
    a = torch.tensor([advantage], dtype=torch.float64)
    loss, clipped = clipped_policy_loss(new, old, a, torch.full_like(a, 0.25), low, high)
    ratio = (new.detach() - old).exp().item()
    plain, bounded = ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage
    assert loss.item() == pytest.approx(-0.25 * min(plain, bounded), abs=1e-12)
    loss.backward()
    assert new.grad is not None
    assert new.grad.item() == pytest.approx(0.0 if bounded < plain else -0.25 * plain, abs=1e-12)
    assert clipped.item() == (bounded < plain)


def test_on_policy_the_ratio_is_one_in_value_but_not_in_gradient() -> None:
    new = torch.randn(5, requires_grad=True)
    a, w = torch.randn(5), torch.rand(5)
    loss, clipped = clipped_policy_loss(new, new, a, w, 0.2, 0.2)
    torch.testing.assert_close(loss, -(w * a).sum())
    loss.backward()
    torch.testing.assert_close(new.grad, -(w * a))
    assert not clipped.any()


def test_separate_clips() -> None:
    ratio = torch.tensor([1.25, 1.25, 0.7, 0.7]).log().requires_grad_()
    a = torch.tensor([1.0, -1.0, 1.0, -1.0])
    _, clipped = clipped_policy_loss(ratio, torch.zeros(4), a, torch.ones(4), 0.2, 0.28)
    assert clipped.tolist() == [False, False, False, True]
    _, clipped = clipped_policy_loss(ratio, torch.zeros(4), a, torch.ones(4), 0.4, 0.2)
    assert clipped.tolist() == [True, False, False, False]


def test_tokens_of_no_weight_and_overflowing_clipped_ones_are_harmless() -> None:
    new = torch.tensor([0.0, math.nan, 500.0], requires_grad=True)
    old = torch.tensor([0.0, 0.0, -500.0])
    a = torch.tensor([1.0, math.inf, 1.0])
    loss, clipped = clipped_policy_loss(new, old, a, torch.tensor([0.5, 0.0, 0.5]), 0.2, 0.2)
    loss.backward()
    assert loss.item() == pytest.approx(-0.5 - 0.6)
    assert new.grad is not None and new.grad.tolist() == [-0.5, 0.0, 0.0]
    assert clipped.tolist() == [False, False, True]


def test_an_empty_micro_batch_still_has_a_graph() -> None:
    new = torch.zeros(0, requires_grad=True)
    loss, clipped = clipped_policy_loss(new, new, torch.zeros(0), torch.zeros(0), 0.2, 0.2)
    loss.backward()
    assert loss.item() == 0 and clipped.shape == (0,)


def test_importance_is_a_constant_factor() -> None:
    new = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    w = torch.tensor([0.0, 0.5, 1.0, 2.0], dtype=torch.float64, requires_grad=True)
    loss, _ = clipped_policy_loss(new, new, torch.ones(4), torch.full((4,), 0.25), 0.2, 0.2, w)
    loss.backward()
    torch.testing.assert_close(loss, -w.sum() / 4)
    torch.testing.assert_close(new.grad, -w.detach() / 4)
    assert w.grad is None


def responses(b: dict[str, Tensor]) -> list[Tensor]:
    """The rows that the loss sees of each response that has some."""
    rows = [((b["segment"] == k) & b["mask"]).nonzero()[:, 0] for k in range(len(LENGTHS))]
    return [r for r in rows if len(r)]


@settings(max_examples=30)
@given(st.integers(0, 2**31))
def test_the_response_ratio_is_gspos(seed: int) -> None:
    """Value and gradient of the mean over responses of min(s_i A_i, clip(s_i) A_i), s_i = (p / p_old)^(1 / |y_i|)."""
    b, low, high = batch(seed), 0.2, 0.3
    new, again = (b["new"].clone().requires_grad_() for _ in range(2))
    a = torch.randn(len(LENGTHS), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    objective, cut = [], torch.zeros_like(b["mask"])
    for rows in responses(b):
        s = ((again[rows].sum() - b["old"][rows].sum()) / len(rows)).exp()
        a_i = a[b["segment"][rows[0]]]
        plain, bounded = s * a_i, s.clamp(1 - low, 1 + high) * a_i
        objective.append(torch.minimum(plain, bounded))
        cut[rows] = bool(bounded < plain)
    expected = -torch.stack(objective).mean()
    statistics = ratio_statistics(new, b["old"], b["mask"], b["segment"], len(LENGTHS))
    log_ratio = mean_log_ratio(statistics, b["segment"])
    w = weights(b, "sequence_mean")
    loss, clipped = sequence_policy_loss(new, log_ratio, a[b["segment"]], w, low, high)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, new), torch.autograd.grad(expected, again))
    assert torch.equal(clipped, cut)


def test_a_response_ratio_with_an_advantage_for_each_token() -> None:
    """The clip is that of the token's own sign; the gradient is s_i A_t grad log p_t."""
    new = torch.tensor([0.1, -0.3, 0.9], requires_grad=True)
    log_ratio = torch.full((3,), 0.5)
    a, w = torch.tensor([1.0, -1.0, 0.5]), torch.tensor([0.25, 0.25, 0.0])
    loss, clipped = sequence_policy_loss(new, log_ratio, a, w, 0.2, 0.2)
    assert clipped.tolist() == [True, False, False]
    assert loss.item() == pytest.approx(-0.25 * (1.2 - math.exp(0.5)))
    loss.backward()
    assert new.grad is not None and new.grad.tolist() == pytest.approx([0.0, 0.25 * math.exp(0.5), 0.0])


@given(st.floats(-3, 3), st.floats(-2, 2, allow_subnormal=False), st.floats(0, 1), st.floats(0, 3))
def test_one_token_of_cispo_against_the_formula(log_ratio: float, advantage: float, low: float, high: float) -> None:
    new = torch.tensor([log_ratio - 1.0], dtype=torch.float64, requires_grad=True)
    loss, cut = cispo_policy_loss(
        new,
        torch.full_like(new, -1.0),
        torch.full_like(new, advantage),
        torch.full_like(new, 0.25),
        low,
        high,
        torch.full_like(new, 1.5),
    )
    ratio = math.exp(log_ratio - 1.0 + 1.0)
    weight = min(max(ratio, 1 - low), 1 + high)
    assert loss.item() == pytest.approx(-0.25 * 1.5 * weight * advantage * (log_ratio - 1.0), abs=1e-9)
    loss.backward()
    assert new.grad is not None
    assert new.grad.item() == pytest.approx(-0.25 * 1.5 * weight * advantage, abs=1e-9)  # never 0 for the clip's sake
    assert cut.item() == (abs(weight - ratio) > 1e-12) or abs(weight - ratio) < 1e-9


def test_all_policy_losses_have_one_gradient_on_policy() -> None:
    new = torch.randn(5, dtype=torch.float64).requires_grad_()
    a, w, i = (torch.randn(5, dtype=torch.float64), *torch.rand(2, 5, dtype=torch.float64))
    losses = (
        clipped_policy_loss(new, new, a, w, 0.2, 0.2, i),
        sequence_policy_loss(new, torch.zeros_like(new), a, w, 0.2, 0.2, i),
        cispo_policy_loss(new, new, a, w, 0.2, 0.2, i),
    )
    for loss, clipped in losses:
        torch.testing.assert_close(torch.autograd.grad(loss, new)[0], -(w * a * i))
        assert not clipped.any()


def test_the_other_losses_ignore_tokens_of_no_weight() -> None:
    bad = torch.tensor([math.nan, -math.inf, -1.0], requires_grad=True)
    w, a = torch.tensor([0.0, 0.0, 0.5]), torch.ones(3)
    sequence, _ = sequence_policy_loss(bad, torch.tensor([math.inf, 0.0, 0.0]), a, w, 0.2, 0.2)
    cispo, _ = cispo_policy_loss(bad, torch.full((3,), -1.0), a, w, 0.2, 0.2)
    bonus = entropy_bonus(bad, w, 0.1)
    for loss, gradient in ((sequence, -0.5), (cispo, -0.5), (bonus, -0.05)):
        (found,) = torch.autograd.grad(loss, bad)
        assert math.isfinite(loss.item()) and found.tolist() == pytest.approx([0.0, 0.0, gradient])


def test_the_entropy_bonus_is_a_weighted_mean() -> None:
    entropy, w = torch.tensor([0.5, 2.0, 9.0]), torch.tensor([0.5, 0.5, 0.0])
    assert entropy_bonus(entropy, w, 0.2).item() == pytest.approx(-0.2 * 1.25)

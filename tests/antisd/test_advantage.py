"""Group-relative advantages and how the term meets them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asd_megatron.antisd import (
    CONDITIONS,
    AdvantageError,
    Overlong,
    compose,
    condition,
    group_advantages,
    phi,
    whitened,
)
from asd_megatron.errors import UserError

rewards = st.lists(st.floats(-10, 10), min_size=2, max_size=12)
values = st.lists(st.floats(-50, 50), min_size=1, max_size=12)


@given(rewards)
def test_group_advantages_by_hand(r: list[float]) -> None:
    a = group_advantages(torch.tensor(r, dtype=torch.float64))
    mean = math.fsum(r) / len(r)
    std = math.sqrt(math.fsum((x - mean) ** 2 for x in r) / (len(r) - 1))
    assert a.dtype == torch.float64
    if len(set(r)) == 1:
        assert a.tolist() == [0.0] * len(r)
    else:
        assert a.tolist() == pytest.approx([(x - mean) / (std + 1e-6) for x in r], abs=1e-7)


def test_binary_group() -> None:
    a = group_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    assert a.tolist() == pytest.approx([0.75 / (0.5 + 1e-6), *[-0.25 / (0.5 + 1e-6)] * 3], abs=1e-12)


KINDS = ("normalized", "centered", "leave_one_out")


@pytest.mark.parametrize("kind", KINDS)
def test_equal_rewards_are_exactly_zero(kind: Any) -> None:
    assert group_advantages(torch.full((7,), 0.1), kind).tolist() == [0.0] * 7


@given(rewards)
def test_baselines_by_hand(r: list[float]) -> None:
    n, x = len(r), torch.tensor(r, dtype=torch.float64)
    mean = math.fsum(r) / n
    assert group_advantages(x, "centered").tolist() == pytest.approx([a - mean for a in r], abs=1e-9)
    others = [math.fsum(r[:i] + r[i + 1 :]) / (n - 1) for i in range(n)]
    assert group_advantages(x, "leave_one_out").tolist() == pytest.approx(
        [a - b for a, b in zip(r, others, strict=True)], abs=1e-8
    )


@given(st.lists(rewards, min_size=1, max_size=4), st.sampled_from(KINDS))
def test_whitening_is_that_of_the_batch(groups: list[list[float]], kind: Any) -> None:
    """(A - mean) / std over all responses, and exactly 0 where it was."""
    a = torch.cat([group_advantages(torch.tensor(r, dtype=torch.float64), kind) for r in groups])
    w = whitened(a)
    torch.testing.assert_close(w, (a - a.mean()) / (a.std() + 1e-6), atol=1e-6, rtol=1e-6)
    assert torch.equal(w == 0, a == 0)


def test_whitening_needs_two_responses() -> None:
    assert whitened(torch.tensor([0.5])).tolist() == [0.5] and whitened(torch.tensor([])).shape == (0,)


@given(st.integers(1, 200), st.integers(0, 199), st.floats(0.1, 3), st.integers(0, 250))
def test_the_overlong_penalty_by_hand(buffer: int, free: int, weight: float, length: int) -> None:
    """DAPO, Eq. 13, times the weight."""
    limit = free + buffer
    if length <= limit - buffer:
        expected = 0.0
    elif length <= limit:
        expected = ((limit - buffer) - length) / buffer
    else:
        expected = -1.0
    found = Overlong(limit, buffer, weight).penalty(length)
    assert found == pytest.approx(weight * expected) and (found == 0) == (expected == 0)


@pytest.mark.parametrize("bad", [[], [1.0], [1.0, math.nan], [math.inf, 0.0]])
def test_refused_groups(bad: list[float]) -> None:
    with pytest.raises(AdvantageError) as error:
        group_advantages(torch.tensor(bad))
    assert isinstance(error.value, ValueError) and isinstance(error.value, UserError)


@given(st.floats(-5, 5), values, st.floats(0, 2))
def test_compositions_by_hand(a_seq: float, u: list[float], lam: float) -> None:
    u64 = torch.tensor(u, dtype=torch.float64)
    a = torch.full_like(u64, a_seq)
    p = phi(u64)
    for name in ("antisd", "no_gate", "student_entropy_gate", "no_teacher"):
        torch.testing.assert_close(compose(name, a, p, lam), a - lam * p)
    torch.testing.assert_close(compose("sd", a, u64, lam), a + lam * u64)
    torch.testing.assert_close(compose("reverse_kl_ascent", a, u64, lam), a - lam * u64)
    factor = (1 - lam * p * a.sign()).clamp(min=0)
    torch.testing.assert_close(compose("multiplicative", a, p, lam), a * factor)
    assert compose("grpo", a, p, lam).tolist() == a.tolist()
    assert compose("grpo", a, p, lam, weight=0.0).tolist() == a.tolist()  # no term to weigh A_seq against


@given(st.floats(-5, 5), values, st.floats(-0.5, 1))
def test_released_compositions_by_hand(a_seq: float, u: list[float], lam: float) -> None:
    u64 = torch.tensor(u, dtype=torch.float64)
    a, p = torch.full_like(u64, a_seq), phi(u64)
    sd, antisd = condition("sd"), condition("antisd")
    plain = compose(replace(antisd, composition="multiplicative_plain"), a, p, lam)
    torch.testing.assert_close(plain, a * (1 - lam * p))
    weighted = [min(max(math.exp((a_seq > 0) * x - (a_seq < 0) * x), 0.8), 1.2) for x in u]
    rlsd = compose(replace(sd, composition="rlsd"), a, u64, lam)
    torch.testing.assert_close(rlsd, a * ((1 - lam) + lam * u64.new_tensor(weighted)))
    torch.testing.assert_close(compose("antisd", a, p, lam, weight=0.25), 0.25 * a - lam * p)
    assert compose("antisd", a, p, 0.0, weight=0.25).tolist() == (0.25 * a).tolist()


@pytest.mark.parametrize("composition", ["additive", "multiplicative", "multiplicative_plain", "rlsd"])
def test_a_lambda_for_each_token(composition: Any) -> None:
    """Equal to one number token by token; exactly A_seq where it is 0, whatever the term is."""
    c = replace(condition("sd"), composition=composition)
    a, q = torch.tensor([0.3, -0.7, 1.1, 0.2]), torch.tensor([1.0, 2.0, -0.5, math.inf])
    lams = [0.5, -0.02, 0.3, 0.0]
    each = compose(c, a, q, torch.tensor(lams))
    assert each.tolist() == [compose(c, a[i : i + 1], q[i : i + 1], lam).item() for i, lam in enumerate(lams)]
    assert each[3] == a[3]


@given(st.floats(-5, 5), values, st.floats(0, 20))
def test_multiplicative_never_flips_the_sign(a_seq: float, u: list[float], lam: float) -> None:
    p = phi(torch.tensor(u, dtype=torch.float64))
    out = compose("multiplicative", torch.full_like(p, a_seq), p, lam)
    assert (out * a_seq >= 0).all()


def test_multiplicative_favours_deliberation_on_either_side() -> None:
    p = phi(torch.tensor([-3.0, 3.0]))
    for a_seq in (1.0, -1.0):
        deliberation, shortcut = compose("multiplicative", torch.full((2,), a_seq), p, 0.5).tolist()
        assert deliberation > a_seq > shortcut


@pytest.mark.parametrize("name", list(CONDITIONS))
def test_closed_gate_and_absent_term_leave_the_group_advantage(name: str) -> None:
    a = torch.tensor([0.3, -0.7, 0.0])
    assert compose(name, a, torch.tensor([1.0, -2.0, math.inf]), 0.0).tolist() == a.tolist()
    assert compose(name, a, torch.zeros(3), 0.5).tolist() == a.tolist()


def test_the_advantage_is_a_constant() -> None:
    term = torch.ones(2, requires_grad=True)
    assert not compose("antisd", torch.ones(2), term, 0.5).requires_grad

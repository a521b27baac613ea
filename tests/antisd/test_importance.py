"""Importance weights by hand, with numpy, and however the tokens are divided."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from asd_megatron.antisd import importance_weights, ratio_statistics
from asd_megatron.antisd.importance import Level

LENGTHS = [3, 11, 1, 0, 6, 9]
LEVELS: tuple[Level, ...] = ("token", "sequence", "geometric")


def batch(seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(scoring, behaviour, mask, segment); the fifth rollout has no sampled token."""
    g = torch.Generator().manual_seed(seed)
    segment = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    mask = (torch.rand(sum(LENGTHS), generator=g) < 0.8) & (segment != 4)
    scoring = -3 * torch.rand(sum(LENGTHS), generator=g, dtype=torch.float64)
    behaviour = scoring + 0.5 * torch.randn(sum(LENGTHS), generator=g, dtype=torch.float64)
    return scoring.to(dtype), behaviour.to(dtype), mask, segment


def ratios(scoring: Tensor, behaviour: Tensor, mask: Tensor, segment: Tensor, level: Level) -> np.ndarray:
    p = np.exp(scoring.numpy()) / np.exp(behaviour.numpy())
    if level == "token":
        return p
    out = np.ones_like(p)
    for k in range(len(LENGTHS)):
        rows = segment.numpy() == k
        counted = p[rows & mask.numpy()]
        product = counted.prod()
        out[rows] = product if level == "sequence" else product ** (1 / max(len(counted), 1))
    return out


@pytest.mark.parametrize("level", LEVELS)
@given(seed=st.integers(0, 2**31), cap=st.floats(0.7, 3.0), floor=st.none() | st.floats(0.0, 0.6))
def test_against_numpy(level: Level, seed: int, cap: float, floor: float | None) -> None:
    scoring, behaviour, mask, segment = batch(seed)
    sums = ratio_statistics(scoring, behaviour, mask, segment, len(LENGTHS))
    found, affected = importance_weights(scoring, behaviour, cap, floor, level=level, statistics=sums, segment=segment)
    w = ratios(scoring, behaviour, mask, segment, level)
    if floor is None:
        np.testing.assert_allclose(found.numpy(), np.minimum(w, cap), rtol=1e-12)
        np.testing.assert_array_equal(affected.numpy(), w > cap)
    else:
        inside = (w >= floor) & (w <= cap)
        np.testing.assert_allclose(found.numpy(), np.where(inside, w, 0.0), rtol=1e-12)
        np.testing.assert_array_equal(affected.numpy(), ~inside)


@given(seed=st.integers(0, 2**31), parts=st.integers(1, 4))
def test_sums_of_disjoint_tokens_add_up(seed: int, parts: int) -> None:
    """Tokens dealt to ranks at random, rollouts torn apart as context parallelism does."""
    scoring, behaviour, mask, segment = batch(seed)
    whole = ratio_statistics(scoring, behaviour, mask, segment, len(LENGTHS))
    owner = torch.randint(parts + 1, scoring.shape, generator=torch.Generator().manual_seed(seed))  # some may be empty
    split = torch.zeros_like(whole)
    for p in range(parts + 1):
        rows = owner == p
        split += ratio_statistics(scoring[rows], behaviour[rows], mask[rows], segment[rows], len(LENGTHS))
    torch.testing.assert_close(split, whole, rtol=1e-13, atol=1e-13)
    assert whole[:, 1].tolist() == [float(mask[segment == k].sum()) for k in range(len(LENGTHS))]


@pytest.mark.parametrize("level", LEVELS)
def test_tokens_that_are_not_sampled_count_nowhere(level: Level) -> None:
    scoring, behaviour, mask, segment = batch(5)
    holed = torch.where(mask, behaviour, math.nan)

    def weights(b: Tensor) -> Tensor:
        sums = ratio_statistics(scoring, b, mask, segment, len(LENGTHS))
        return importance_weights(scoring, b, 1.5, 0.5, level=level, statistics=sums, segment=segment)[0]

    assert not mask.all()
    assert torch.equal(weights(holed)[mask], weights(behaviour)[mask])
    if level != "token":
        assert (weights(holed)[segment == 4] == 1.0).all()  # nothing says that the response is unlikely


def test_truncated_weights_are_constants() -> None:
    scoring = torch.tensor([-1.0, -1.0, -1.0, 0.0], requires_grad=True)
    behaviour = torch.tensor([-1.0, -2.0, -0.5, -800.0])
    w, affected = importance_weights(scoring, behaviour, 2.0)
    assert w.tolist() == pytest.approx([1.0, 2.0, math.exp(-0.5), 2.0])
    assert affected.tolist() == [False, True, False, True]
    assert not w.requires_grad and w.dtype == torch.float32


def test_masked_weights_keep_what_lies_between() -> None:
    scoring = torch.tensor([0.5, 0.49, 1.0, 1.99, 2.01, 1e30]).log()
    w, affected = importance_weights(scoring, torch.zeros(6), 2.0, 0.499)
    assert w.tolist() == pytest.approx([0.5, 0.0, 1.0, 1.99, 0.0, 0.0], abs=1e-5)
    assert affected.tolist() == [False, True, False, False, True, True]


def test_a_long_response_overflows_into_the_cap() -> None:
    scoring, behaviour = torch.full((4000,), -1.0), torch.full((4000,), -2.0)
    segment, mask = torch.zeros(4000, dtype=torch.int64), torch.ones(4000, dtype=torch.bool)
    sums = ratio_statistics(scoring, behaviour, mask, segment, 1)
    w, affected = importance_weights(scoring, behaviour, 2.0, level="sequence", statistics=sums, segment=segment)
    assert (w == 2.0).all() and affected.all()
    w, affected = importance_weights(scoring, behaviour, 2.0, 0.5, level="sequence", statistics=sums, segment=segment)
    assert (w == 0.0).all() and affected.all()
    w, _ = importance_weights(scoring, behaviour, 3.0, level="geometric", statistics=sums, segment=segment)
    torch.testing.assert_close(w, torch.full_like(w, math.e))


def test_levels_above_the_token_need_sums() -> None:
    with pytest.raises(ValueError, match="importance level geometric needs the responses' statistics"):
        importance_weights(torch.zeros(2), torch.zeros(2), 2.0, level="geometric")


def test_an_empty_micro_batch() -> None:
    none = torch.zeros(0)
    sums = ratio_statistics(none, none, none.bool(), none.long(), 2)
    assert sums.tolist() == [[0.0, 0.0]] * 2
    w, affected = importance_weights(none, none, 2.0, level="sequence", statistics=sums, segment=none.long())
    assert w.shape == affected.shape == (0,)

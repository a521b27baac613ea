"""Distributed order statistics against sorting."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asd_megatron.ops.quantile import distributed_order_statistics, lower_median, quantiles
from tests.distributed.harness import run_ranks

VALUES = st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None)
@given(VALUES)
def test_every_order_statistic_equals_sort(values: list[float]) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    got, n = distributed_order_statistics(x, range)
    assert n == len(values)
    assert torch.equal(torch.tensor(got), x.sort().values)


@settings(max_examples=40, deadline=None)
@given(VALUES)
def test_median_is_the_lower_one(values: list[float]) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    assert lower_median(x) == x.sort().values[(len(values) - 1) // 2].item() == x.median().item()


def test_quantiles_equal_numpy() -> None:
    g = torch.Generator().manual_seed(0)
    qs = [0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0]
    for n in (1, 2, 3, 10, 1000):
        x = torch.randn(n, generator=g) * 10
        want = np.quantile(x.double().numpy(), qs)
        assert np.allclose(quantiles(x, qs), want, rtol=1e-12, atol=0)


def test_special_values() -> None:
    inf = math.inf
    x = torch.tensor([inf, -inf, -0.0, 0.0, 1e-45, -1e-45, 3.4e38, -3.4e38])
    got, _ = distributed_order_statistics(x, range)
    assert got == sorted(x.tolist())
    assert quantiles(torch.tensor([-inf, -inf, inf]), [0.0, 0.5, 1.0]) == [-inf, -inf, inf]
    with_nan, _ = distributed_order_statistics(torch.tensor([math.nan, -math.nan, 1.0, inf]), range)
    assert with_nan[:2] == [1.0, inf] and math.isnan(with_nan[2]) and math.isnan(with_nan[3])


def test_nothing_anywhere() -> None:
    assert math.isnan(lower_median(torch.zeros(0)))
    assert [math.isnan(v) for v in quantiles(torch.zeros(0), [0.1, 0.9])] == [True, True]
    assert distributed_order_statistics(torch.zeros(0), range) == ([], 0)


def test_bfloat16_and_any_shape() -> None:
    x = torch.randn(3, 4).bfloat16()
    assert lower_median(x) == x.flatten().sort().values[5].item()


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="float32 and narrower"):
        lower_median(torch.zeros(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="float32 and narrower"):
        lower_median(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"0 \.\. 2"):
        distributed_order_statistics(torch.zeros(3), lambda n: [3])
    with pytest.raises(ValueError, match=r"lie in \[0, 1\]"):
        quantiles(torch.zeros(3), [1.5])


def _split(rank: int, sizes_of_cases: list[list[int]]) -> list[tuple[list[float], float, list[float]]]:
    group = torch.distributed.group.WORLD
    out = []
    for case, sizes in enumerate(sizes_of_cases):
        whole = _whole(case, sum(sizes))
        start = sum(sizes[:rank])
        mine = whole[start : start + sizes[rank]]
        out.append(
            (
                distributed_order_statistics(mine, range, group)[0],
                lower_median(mine, group),
                quantiles(mine, [0.05, 0.5, 0.95], group),
            )
        )
    return out


def _whole(case: int, n: int) -> torch.Tensor:
    x = torch.randn(n, generator=torch.Generator().manual_seed(case))
    return x.round() if case % 2 else x  # ties too


def test_uneven_and_empty_ranks() -> None:
    cases = [[5, 2, 11], [0, 7, 0], [0, 0, 1], [4, 4, 4], [0, 0, 0]]
    ranks = run_ranks(_split, 3, cases)
    assert repr(ranks[0]) == repr(ranks[1]) == repr(ranks[2])
    for case, (sizes, (order, median, qs)) in enumerate(zip(cases, ranks[0], strict=True)):
        x = _whole(case, sum(sizes))
        if len(x) == 0:
            assert order == [] and math.isnan(median) and all(map(math.isnan, qs))
            continue
        assert torch.equal(torch.tensor(order), x.sort().values)
        assert median == x.median().item()
        assert np.allclose(qs, np.quantile(x.double().numpy(), [0.05, 0.5, 0.95]), rtol=1e-12)

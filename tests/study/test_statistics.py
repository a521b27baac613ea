"""The numbers of a report, against hand-made ones."""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asd_megatron.study.statistics import (
    bootstrap_interval,
    crossing,
    differences,
    is_number,
    mean_and_sd,
    paired,
    reached,
    resample,
    sign_flip_p,
    summarize,
    value_at,
    variance_components,
)

NAN = math.nan
numbers = st.lists(st.floats(-10, 10), min_size=2, max_size=8)


def test_what_is_a_number() -> None:
    assert [is_number(x) for x in (1, -0.5, NAN, math.inf, None, True, "1")] == [True, True] + [False] * 5


@given(numbers)
def test_summary_is_mean_and_sample_deviation(values: list[float]) -> None:
    found = summarize([*values, None, NAN])
    assert found.mean == pytest.approx(statistics.fmean(values), abs=1e-9)
    assert found.sd == pytest.approx(statistics.stdev(values), abs=1e-9)
    assert (found.n, found.missing) == (len(values), 2)


def test_summary_of_one_and_of_none() -> None:
    one, none = summarize([3.0]), summarize([None])
    assert (one.mean, one.n) == (3.0, 1) and math.isnan(one.sd)
    assert math.isnan(none.mean) and (none.n, none.missing) == (0, 1)


def test_differences_are_of_the_same_keys() -> None:
    ours = {("a", 1): 3.0, ("a", 2): None, ("b", 1): 5.0}
    assert differences(ours, {("a", 1): 1.0, ("a", 2): 1.0, ("c", 1): 9.0}) == {("a", 1): 2.0, ("a", 2): None}


def test_bootstrap_interval_of_a_large_sample_is_the_normal_one() -> None:
    values = np.random.default_rng(3).normal(1.0, 2.0, 400)
    low, high = bootstrap_interval(values.tolist())
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.02)
    assert high == pytest.approx(values.mean() + half, abs=0.02)
    assert bootstrap_interval(values.tolist()) == (low, high)  # the seed is fixed


def test_bootstrap_interval_needs_two_values() -> None:
    assert all(math.isnan(bound) for bound in bootstrap_interval([1.0]))
    assert bootstrap_interval([2.0, 2.0, 2.0]) == (2.0, 2.0)


@given(numbers)
def test_sign_flip_counts_all_flips(values: list[float]) -> None:
    total = abs(sum(values))
    flips = [
        abs(sum(s * v for s, v in zip(signs, values, strict=True)))
        for signs in itertools.product((-1, 1), repeat=len(values))
    ]
    slack = 1e-9 * sum(map(abs, values))
    assert sign_flip_p(values) == pytest.approx(sum(f >= total - slack for f in flips) / len(flips))


def test_sign_flip_of_few_and_of_many() -> None:
    assert sign_flip_p([0.1, 0.2, 0.3]) == 0.25  # the smallest that three pairs allow
    assert math.isnan(sign_flip_p([]))
    assert sign_flip_p([1.0] * 40) < 0.001
    assert sign_flip_p([1.0, -1.0] * 20) > 0.9


def test_paired_counts_what_is_missing() -> None:
    found = paired([1.0, 2.0, 3.0, None, NAN])
    assert (found.summary.mean, found.summary.n, found.summary.missing, found.p) == (2.0, 3, 2, 0.25)
    assert 1.0 <= found.low < 2.0 < found.high <= 3.0


def test_crossing_is_on_the_line_between_points() -> None:
    assert crossing([0, 10, 20], [0.2, 0.4, 0.8], 0.6) == pytest.approx(15.0)
    assert crossing([0, 10, 20], [0.2, None, 0.8], 0.5) == pytest.approx(10.0)  # the missing point is left out
    assert crossing([0, 10], [0.7, 0.1], 0.6) == 0.0
    assert crossing([0, 10], [0.2, 0.5], 0.6) is None
    assert crossing([], [], 0.6) is None


def test_values_between_and_outside_the_points() -> None:
    assert value_at([0, 10], [1.0, 3.0], 2.5) == pytest.approx(1.5)
    assert value_at([0, 10], [1.0, 3.0], 10.5) is None
    assert value_at([0, 10], [None, NAN], 5.0) is None
    assert np.isnan(resample([], [], np.asarray([1.0]))).all()


def test_mean_curve_has_no_number_where_a_cell_has_none() -> None:
    mean, sd = mean_and_sd([np.asarray([1.0, 2.0, NAN]), np.asarray([3.0, 2.0, 5.0])])
    assert mean[:2].tolist() == [2.0, 2.0] and sd[:2] == pytest.approx([math.sqrt(2.0), 0.0])
    assert math.isnan(mean[2]) and math.isnan(sd[2])
    assert np.isnan(mean_and_sd([np.asarray([1.0])])[1]).all()


def test_a_cell_that_never_gets_there_is_later_than_any() -> None:
    found = reached([10.0, 30.0, None])
    assert (found.mean, found.median, found.reached, found.never) == (20.0, 30.0, 2, 1)
    assert reached([10.0, None]).median is None
    assert reached([10.0, 20.0]).median == 15.0
    assert reached([None, None]).reached == 0


def test_variance_components_tell_starts_from_seeds() -> None:
    found = variance_components({"a": [1.0, 3.0], "b": [5.0, 7.0]})
    # within: 2; mean squares between: 2 * 2 * (2 ** 2) = 16; (16 - 2) / 2 = 7
    assert found.within == pytest.approx(math.sqrt(2.0)) and found.between == pytest.approx(math.sqrt(7.0))
    assert variance_components({"a": [1.0, 3.0], "b": [1.0, 3.0]}).between == 0.0
    alone = variance_components({"a": [1.0, 3.0, None]})
    assert math.isnan(alone.between) and alone.within == pytest.approx(math.sqrt(2.0)) and alone.n == 2
    assert math.isnan(variance_components({"a": [1.0], "b": [2.0]}).within)


def test_variance_components_recover_what_was_put_in() -> None:
    random = np.random.default_rng(0)
    groups = {i: (random.normal(0, 3.0) + random.normal(0, 1.0, 3 + i % 5)).tolist() for i in range(800)}
    found = variance_components(groups)
    assert found.between == pytest.approx(3.0, rel=0.08) and found.within == pytest.approx(1.0, rel=0.05)

"""Lambda from the teacher's perplexity, against numbers worked out by hand and against the dense reference."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asd_megatron.antisd import PerplexityError, PerplexityLambda, PerplexityRule, response_perplexities
from tests.reference.dense import DenseGate, DensePerplexity, DenseRecipe, perplexity_step


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_the_formula() -> None:
    """lambda_0 * alpha = 0.2; the ratio P / P* is clipped to 0.5 .. 3, lambda to -0.02 .. 0.5, P above 3 gets 0."""
    rule = PerplexityRule()
    p = tensor(1.2, 1.2 * math.e**0.5, 0.3, 3.0, 3.0001, math.nan, math.inf)
    assert rule.lambdas(p, 1.2).tolist() == pytest.approx([0, 0.1, -0.02, 0.2 * math.log(2.5), 0, 0, 0], abs=1e-15)
    wide = PerplexityRule(lambda_0=1.0, lambda_min=-9.0, lambda_max=2.0, cutoff=100.0)
    assert wide.lambdas(tensor(0.1, 50.0), 1.2).tolist() == pytest.approx([2 * math.log(0.5), 2.0])
    assert PerplexityRule(lambda_0=1.0, cutoff=100.0, lambda_max=9.0).lambdas(tensor(50.0), 1.2).tolist() == [
        pytest.approx(2 * math.log(3))
    ]


def test_one_lambda_for_the_batch_is_of_the_mean_logarithm() -> None:
    p = tensor(1.2, 1.8, math.nan, 5.0)
    expected = 0.2 * (math.log(1.0) + math.log(1.5) + math.log(3.0)) / 3
    assert PerplexityRule(scope="batch").lambdas(p, 1.2).tolist() == pytest.approx([expected, expected, 0, 0])


@pytest.mark.parametrize(("shift", "target"), [("always", 1.2), ("negative", 2.2)])
def test_shifted_lambdas_have_mean_0_and_cut_ones_stay_0(shift: Any, target: float) -> None:
    p = tensor(1.3, 2.0, 1.7, 4.0, math.nan)
    rule = PerplexityRule(shift=shift, lambda_min=-0.3)
    lambdas = rule.lambdas(p, target)
    plain = PerplexityRule(lambda_min=-0.3).lambdas(p, target)
    assert lambdas[3:].tolist() == [0, 0] and float(lambdas[:3].mean()) == pytest.approx(0, abs=1e-15)
    assert torch.allclose(lambdas[:3] - lambdas[0], plain[:3] - plain[0])
    assert torch.equal(PerplexityRule(shift="negative", lambda_min=-0.3).lambdas(p, 1.01)[:3] > 0, torch.ones(3) > 0)


def test_warm_up_measures_the_target() -> None:
    """Steps without a perplexity do not count, a mean of 10 and more is left out; the first step after may act."""
    rule = PerplexityRule()
    watch = PerplexityLambda(rule, 4)
    steps = [tensor(1.4, 1.6), tensor(math.nan), tensor(1.2), tensor(30.0, 2.0), tensor(1.9, 1.1, math.nan)]
    assert all(not watch.update(p).any() and watch.warming_up for p in steps)
    assert watch.target == pytest.approx(1.5 - 0.1)  # of the means 1.5, 1.2, 1.5; 16 is left out
    assert watch.update(tensor(math.nan)).tolist() == [0.0] and watch.warming_up  # nothing changes
    assert watch.update(tensor(2.8)).tolist() == pytest.approx([0.2 * math.log(2.0)]) and not watch.warming_up
    assert watch.update(tensor(1.4)).tolist() == pytest.approx([0.0], abs=1e-15)


@pytest.mark.parametrize(
    ("rule", "target"),
    [
        (PerplexityRule(), 1.9),
        (PerplexityRule(target_ratio=0.9), 1.8),
        (PerplexityRule(target_offset=5.0), 1.01),
        (PerplexityRule(target_ratio=0.1), 1.01),
    ],
)
def test_the_target_of_a_median_of_2(rule: PerplexityRule, target: float) -> None:
    watch = PerplexityLambda(rule, 1)
    watch.update(tensor(2.0))
    assert watch.target == pytest.approx(target)


def test_a_warm_up_without_a_usable_step_lasts_until_there_is_one() -> None:
    watch = PerplexityLambda(PerplexityRule(), 2)
    for p in (12.0, 50.0, 10.0):
        assert not watch.update(tensor(p)).any() and watch.target is None and watch.warming_up
    watch.update(tensor(2.0))
    assert watch.target == pytest.approx(1.9)


def test_a_given_target_needs_no_warm_up_and_stays() -> None:
    watch = PerplexityLambda(PerplexityRule(), 0, target=1.4)
    assert watch.update(tensor(2.8)).tolist() == pytest.approx([0.2 * math.log(2.0)])
    later = PerplexityLambda(PerplexityRule(), 1, target=1.4)
    assert later.update(tensor(2.8)).tolist() == [0.0] and later.target == 1.4
    other = PerplexityLambda(PerplexityRule(), 1)
    other.update(tensor(5.0))
    watch.load_state_dict(other.state_dict())
    assert watch.target == 1.4
    for bad in ((0, None), (1, 1.0)):
        with pytest.raises(PerplexityError, match=r"perplexity\.target"):
            PerplexityLambda(PerplexityRule(), *bad)


PERPLEXITIES = st.lists(st.one_of(st.none(), st.floats(1.0, 14.0)), min_size=1, max_size=6)


@given(
    st.lists(PERPLEXITIES, min_size=1, max_size=9),
    st.integers(1, 4),
    st.sampled_from(["response", "batch"]),
    st.sampled_from(["none", "negative", "always"]),
    st.sampled_from([None, 0.8, 1.1]),
    st.integers(0, 8),
)
def test_any_steps_with_a_resume_among_them_against_the_reference(
    steps: list[list[float | None]], warmup: int, scope: Any, shift: Any, ratio: float | None, resume: int
) -> None:
    rule = PerplexityRule(0.3, 1.5, -0.1, 0.4, 6.0, scope, shift, ratio, 0.2)
    recipe = DenseRecipe(lambda_max=0.4, warmup_steps=warmup)
    reference = DensePerplexity(0.3, 1.5, -0.1, 6.0, scope, shift, ratio, 0.2)
    watch, memory = PerplexityLambda(rule, warmup), DenseGate()
    for k, found in enumerate(steps):
        if k == resume:
            state = json.loads(json.dumps(watch.state_dict()))
            watch = PerplexityLambda(rule, warmup)
            watch.load_state_dict(state)
        expected = perplexity_step(recipe, reference, memory, found)
        lambdas = watch.update(tensor(*(math.nan if p is None else p for p in found)))
        assert lambdas.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_perplexities_of_responses() -> None:
    logprobs = torch.tensor([-1.0, -3.0, math.nan, -2.0, -0.5])
    counted = torch.tensor([True, True, False, True, False])
    segment = torch.tensor([0, 0, 0, 2, 3])
    found = response_perplexities(logprobs, counted, segment, 4)
    assert found.dtype is torch.float64
    assert found.tolist() == pytest.approx([math.e**2, math.nan, math.e**2, math.nan], nan_ok=True)

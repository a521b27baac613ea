"""The pure parts of sampling: filters, noise, inverse CDF, stops."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asd_megatron.errors import UserError
from asd_megatron.records import SamplingParams
from asd_megatron.rollout.embedded.sampler import (
    StopCheck,
    check_params,
    draw,
    filter_probabilities,
    inverse_cdf,
    uniforms,
)


def _cdf(probabilities: list[float], noise: float) -> int:
    weights = torch.tensor([probabilities], dtype=torch.float64)
    return int(inverse_cdf(weights, torch.tensor([noise], dtype=torch.float64))[0])


def test_inverse_cdf_at_the_ends_never_takes_a_token_of_probability_zero() -> None:
    below_one = float(np.nextafter(1.0, 0.0))
    assert _cdf([0.0, 0.0, 0.5, 0.0, 0.5, 0.0, 0.0], 0.0) == 2
    assert _cdf([0.0, 0.0, 0.5, 0.0, 0.5, 0.0, 0.0], below_one) == 4
    assert _cdf([0.25, 0.0, 0.75], 0.25) == 2  # the boundary belongs to the next token
    assert _cdf([1.0], below_one) == 0
    assert _cdf([3.0, 1.0], 0.8) == 1  # need not sum to one
    tiny = [0.0, 1e-300, 0.0]
    assert _cdf(tiny, 0.0) == _cdf(tiny, 0.5) == _cdf(tiny, below_one) == 1


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30).filter(any), st.floats(0, 1, exclude_max=True))
def test_inverse_cdf_is_the_definition(weights: list[float], noise: float) -> None:
    token = _cdf(weights, noise)
    assert weights[token] > 0
    before, after = sum(weights[:token]), sum(weights[: token + 1])
    total = sum(weights)
    assert before <= noise * total * (1 + 1e-12) and noise * total <= after * (1 + 1e-12)


def test_sampling_follows_the_distribution() -> None:
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(0)) * 2
    count = 200_000
    noise = torch.from_numpy(uniforms(7, 3, "p", 0, count))
    for params in (
        SamplingParams(temperature=0.7),
        SamplingParams(temperature=1.3, top_k=5),
        SamplingParams(top_p=0.8),
    ):
        tokens, _ = draw(logits.expand(count, -1), noise, params)
        expected = filter_probabilities(torch.softmax(logits / params.temperature, -1), params.top_k, params.top_p)[0]
        expected = expected / expected.sum()
        found = torch.bincount(tokens, minlength=12) / count
        assert (found[expected == 0] == 0).all()
        deviation = (found - expected).abs() / (expected * (1 - expected) / count).sqrt().clamp(min=1e-9)
        assert deviation[expected > 0].max() < 4.5


def test_noise_is_a_function_of_its_name_and_position() -> None:
    whole = uniforms(1, 2, "prompt", 3, 40)
    assert whole.dtype == np.float64 and (whole >= 0).all() and (whole < 1).all()
    assert (uniforms(1, 2, "prompt", 3, 40) == whole).all()
    assert (uniforms(1, 2, "prompt", 3, 8) == whole[:8]).all()
    assert (uniforms(1, 2, "prompt", 3, 12, start=16) == whole[16:28]).all()
    others = [(2, 2, "prompt", 3), (1, 3, "prompt", 3), (1, 2, "prompt ", 3), (1, 2, "prompt", 4), (12, 2, "prompt", 3)]
    for other in others:
        assert not (uniforms(*other, 40) == whole).any()
    golden = [0.8146186729986608, 0.9896409083622976, 0.4155150652689643, 0.9528722479010052]
    assert uniforms(1234, 7, "p", 3, 4).tolist() == golden  # a change would change every run
    with pytest.raises(ValueError, match="multiple of 4"):
        uniforms(1, 2, "prompt", 3, 4, start=2)


def test_noise_is_uniform_over_names_too() -> None:
    firsts = np.array([uniforms(5, step, f"p{i}", s, 1)[0] for step in range(5) for i in range(20) for s in range(10)])
    assert abs(firsts.mean() - 0.5) < 4 / np.sqrt(12 * len(firsts))
    assert np.histogram(firsts, bins=10, range=(0, 1))[0].min() > 60


def test_logprobs_are_before_the_filters_and_at_the_temperature() -> None:
    logits = torch.randn(4, 9)
    noise = torch.rand(4, dtype=torch.float64)
    params = SamplingParams(temperature=0.5, top_k=2, top_p=0.9)
    tokens, logprobs = draw(logits, noise, params)
    expected = torch.log_softmax(logits / 0.5, -1)[torch.arange(4), tokens]
    torch.testing.assert_close(logprobs, expected, atol=1e-6, rtol=0)
    assert logprobs.dtype == torch.float32
    tokens, logprobs = draw(logits, None, dataclasses.replace(params, temperature=0.0))
    assert torch.equal(tokens, logits.argmax(-1))
    torch.testing.assert_close(logprobs, torch.log_softmax(logits, -1).max(-1).values, atol=1e-6, rtol=0)


def test_logprobs_count_the_long_tail_of_a_large_vocabulary() -> None:
    logits = torch.full((1, 49_152), -12.0)  # each too small to change a float32 sum that already holds the first
    logits[0, 0] = 0.0
    _, logprobs = draw(logits, None, SamplingParams(temperature=0.0))
    expected = torch.log_softmax(logits.double(), -1)[:, 0]
    torch.testing.assert_close(logprobs.double(), expected, atol=3e-6, rtol=0)


def test_top_k() -> None:
    p = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    assert torch.equal(filter_probabilities(p, 0, 1.0), p)
    assert torch.equal(filter_probabilities(p, 4, 1.0), p)
    assert torch.equal(filter_probabilities(p, 100, 1.0), p)
    assert torch.equal(filter_probabilities(p, 1, 1.0), torch.tensor([[0, 0.4, 0, 0]]))
    assert torch.equal(filter_probabilities(p, 2, 1.0), torch.tensor([[0, 0.4, 0, 0.3]]))
    ties = torch.full((1, 4), 0.25)
    assert torch.equal(filter_probabilities(ties, 2, 1.0), torch.tensor([[0.25, 0.25, 0, 0]]))


def test_top_p() -> None:
    p = torch.tensor([[0.125, 0.5, 0.25, 0.125]])
    assert torch.equal(filter_probabilities(p, 0, 1e-9), torch.tensor([[0, 0.5, 0, 0]]))
    assert torch.equal(filter_probabilities(p, 0, 0.5), torch.tensor([[0, 0.5, 0, 0]]))  # exactly reached
    assert torch.equal(filter_probabilities(p, 0, 0.51), torch.tensor([[0, 0.5, 0.25, 0]]))
    assert torch.equal(filter_probabilities(p, 0, 0.76), torch.tensor([[0.125, 0.5, 0.25, 0]]))
    assert torch.equal(filter_probabilities(p, 0, 0.9999), p)
    # top-p is a share of what top-k left: 0.5 of (0.5 + 0.25) reaches 0.6.
    assert torch.equal(filter_probabilities(p, 2, 0.6), torch.tensor([[0, 0.5, 0, 0]]))


def test_filters_equal_a_full_stable_sort() -> None:
    generator = torch.Generator().manual_seed(0)
    flat = torch.rand(4, 5000, generator=generator)
    peaked = torch.randn(4, 5000, generator=generator).mul(4).softmax(-1)
    ties = torch.randint(0, 4, (4, 5000), generator=generator)
    for p in (flat.double(), peaked.double(), ties.double(), ties[:, :7].double()):
        for top_k, top_p in ((0, 0.9), (0, 0.3), (0, 0.999), (3, 1.0), (2000, 1.0), (2000, 0.5), (6, 0.7)):
            ordered, order = torch.sort(p, dim=-1, descending=True, stable=True)
            if 0 < top_k < p.shape[-1]:
                ordered[:, top_k:] = 0
            share = ordered.cumsum(-1) - ordered
            ordered = ordered.where((share < top_p * ordered.sum(-1, keepdim=True)) | (top_p >= 1), 0)
            expected = torch.zeros_like(p).scatter_(-1, order, ordered)
            assert torch.equal(filter_probabilities(p, top_k, top_p), expected)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1.0),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("max_new_tokens", 0),
        ("n", 0),
        ("stop", ("",)),
    ],
)
def test_meaningless_parameters_are_refused(field: str, value: Any) -> None:
    check_params(SamplingParams())
    with pytest.raises(UserError, match=field):
        check_params(dataclasses.replace(SamplingParams(), **{field: value}))


def _bytes(ids: Sequence[int]) -> str:
    return bytes(ids).decode(errors="replace")


def _ends(check: StopCheck, text: str) -> int | None:
    """Feed a text byte by byte; the position at which it ends."""
    ids = np.array([list(text.encode())])
    for t in range(1, ids.shape[1] + 1):
        if check(ids[:, max(0, t - check.tail) : t])[0]:
            return t
    return None


def test_stop_tokens_and_strings() -> None:
    assert _ends(StopCheck((33, 10), (), None), "ab!c") == 3
    assert StopCheck((33, 10), (), None).tail == 1
    check = StopCheck((), ("\n\n", "END"), _bytes)
    assert _ends(check, "one\ntwo\n\nthree") == len("one\ntwo\n\n")
    assert _ends(check, "x" * 100 + "EN END") == 106
    assert _ends(check, "nothing") is None
    assert _ends(StopCheck((), ("né",), _bytes), "e né!") == len("e né".encode())
    both = StopCheck((99,), ("b",), _bytes)
    assert both(np.array([[97, 98], [97, 97], [97, 99]])).tolist() == [True, False, True]
    with pytest.raises(UserError, match="tokenizer"):
        StopCheck((), ("x",), None)

"""Generation: a decode step by hand, the long tail against simulated draws."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from asd_megatron.planner import lengths
from asd_megatron.planner.compute import Rates
from asd_megatron.planner.rollout import Engine, generate, generation, sglang_engine, touched
from asd_megatron.planner.setting import Lengths, Serving
from tests.planner.settings import LONG_TAIL, WORK, setting

FREE = Rates(products=math.inf, head=math.inf, attention=math.inf, memory=1.0, launch=0.0, width=2)


def engine(*, weights: float = 0.0, cache: float = 0.0, window: int | None = None) -> Engine:
    """One layer whose step takes `weights` seconds, and `cache` more for each token that is attended to."""
    return Engine(FREE, weights, 0.0, 0, 0, cache, ((window, 1),), 0.0, 0.0, 0.0, 0.0, 0.0)


def draws(of: Lengths, shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.minimum(of.median * np.exp(of.spread * rng.standard_normal(shape)), of.most)


@pytest.mark.parametrize("of", [LONG_TAIL, Lengths(2000, 8000, 0.6), Lengths(500, 32768, 1.2)])
def test_moments_and_the_longest_are_those_of_draws(of: Lengths) -> None:
    found = draws(of, (20000, 32))
    assert lengths.mean(of) == pytest.approx(found.mean(), rel=0.01)
    assert lengths.mean_in_flight(of) == pytest.approx((found**2).mean() / (2 * found.mean()), rel=0.01)
    assert lengths.expected_longest(of, 32) == pytest.approx(found.max(1).mean(), rel=0.01)
    assert np.mean(lengths.quantiles(of, 256)) == pytest.approx(found.mean(), rel=0.02)


def test_equal_lengths_have_no_tail() -> None:
    equal = Lengths(1000, 4000, 0.0)
    assert lengths.quantiles(equal, 3) == (1000, 1000, 1000)
    assert lengths.mean(equal) == lengths.expected_longest(equal, 99) == 1000
    assert lengths.mean_in_flight(equal) == 500


def test_places_are_taken_over_by_waiting_responses() -> None:
    """Lengths 4 2 3 and two places: 5 steps. The order of arrival is 4, 3, 2 here: 3 ends first, then 2 begins."""
    seconds, _ = generate(engine(weights=1.0), [4, 2, 3], 2, prompt=0)
    assert seconds.seconds == 5
    assert generate(engine(weights=1.0), [4, 2, 3], 1, prompt=0)[0].seconds == 9
    assert generate(engine(weights=1.0), [4, 2, 3], 3, prompt=0)[0].seconds == 4


def test_the_context_of_a_batch_is_counted_token_by_token() -> None:
    """Each response of n tokens reads prompt + 0, ..., prompt + n - 1 tokens, in the mean prompt + n / 2 - 1 / 2; the
    planner counts prompt + n / 2."""
    seconds, _ = generate(engine(cache=1.0), [400, 200, 300], 3, prompt=50)
    assert seconds.seconds == pytest.approx(sum(n * (50 + n / 2) for n in (400, 200, 300)))
    near, _ = generate(engine(cache=1.0, window=10), [400], 1, prompt=50)
    assert near.seconds == pytest.approx(400 * 10)


def test_the_shrinking_batch_is_that_of_draws() -> None:
    """32 responses at a time of 64: the mean over 200 simulated batches is met within 3%."""
    e = engine(weights=1.0, cache=1e-5)
    planned, tail = generate(e, lengths.quantiles(LONG_TAIL, 64)[::-1], 32, 300, late=15000)
    simulated = [generate(e, [round(n) for n in batch], 32, 300)[0].seconds for batch in draws(LONG_TAIL, (200, 64))]
    assert planned.seconds == pytest.approx(np.mean(simulated), rel=0.03)
    assert 0 < tail < planned.seconds


def test_a_decode_step_of_qwen3_8b_by_hand() -> None:
    e = sglang_engine(setting(serving=Serving()))
    step = e.step(32, 4096)
    weights = 2 * (6_945_767_424 + 4096 * 151_936)  # layers and head
    cache = 32 * 4096 * 36 * 2 * 8 * 128 * 2
    assert step.memory == pytest.approx((weights + cache) / (3350e9 * 0.8) + 2e-4 + 36 * 10 * 3e-6)
    # Two ranks read half of both, and meet twice a layer.
    pair = sglang_engine(setting(serving=Serving(tensor_parallel=2))).step(32, 4096)
    assert pair.memory == pytest.approx((weights + cache) / 2 / (3350e9 * 0.8) + 2e-4 + 36 * 10 * 3e-6)
    exchanged = 72 * (2 * 32 * 4096 * 2 / 2 / (450e9 * 0.75) + 2 * 5e-6)
    assert pair.communication == pytest.approx(exchanged)


def test_experts_are_read_as_far_as_the_batch_reaches_them() -> None:
    assert touched(1, 8, 128) == pytest.approx(1 / 16)
    assert touched(32, 8, 128) == pytest.approx(1 - (15 / 16) ** 32)
    e = sglang_engine(setting("Qwen3-30B-A3B"))
    assert e.experts == 2 * 48 * 128 * 3 * 2048 * 768
    assert e.step(1, 1000).seconds < 0.3 * e.step(64, 1000).seconds


def test_more_servers_shorten_generation_down_to_the_longest_response() -> None:
    times = [generation(setting(serving=Serving(servers=n))).seconds for n in (2, 8, 32, 256)]
    assert times == sorted(times, reverse=True)
    alone = sglang_engine(setting()).step(1, 300 + 32768 / 2).seconds * 32768
    assert times[-1] == pytest.approx(alone, rel=0.02)
    assert generation(setting(serving=Serving(servers=256))).batch == 1


def test_requests_and_cache_limit_the_batch() -> None:
    narrow = generation(setting(serving=Serving(servers=8, requests=4)))
    assert narrow.batch == 4 and narrow.limited
    assert narrow.seconds > generation(setting(serving=Serving(servers=8))).seconds
    small = generation(replace(setting(serving=Serving(servers=1)), workload=replace(WORK, prompt=20000)))
    assert small.limited

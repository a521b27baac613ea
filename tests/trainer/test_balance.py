"""Balance over ranks and packs: nothing lost, budgets kept, and never busier than the plain greedy rules."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asd_megatron.models.flops import FlopsModel, forward_flops
from asd_megatron.records import PackCounts
from asd_megatron.trainer.balance import assign, cheap_ends, fill_bins, first_fit

QWEN3_8B = FlopsModel(6_945_767_424, 32, 128, (None,) * 36, 4096, 151936)


def flops(length: int) -> int:
    return forward_flops(QWEN3_8B, PackCounts(((0, length),), length))


def greedy(costs: list[int], parts: int, work: list[int]) -> int:
    """The most work of a part when items go by falling cost to the part with the least."""
    loads, done = [0] * parts, [0] * parts
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        part = min(range(parts), key=lambda p: (loads[p], p))
        loads[part] += costs[i]
        done[part] += work[i]
    return max(done)


def long_tail(seed: int, count: int = 256) -> list[int]:
    rng = random.Random(seed)
    return [min(int(rng.lognormvariate(8.7, 1.0)), 32768) + 300 for _ in range(count)]


@given(st.lists(st.integers(1, 10**16), max_size=40), st.integers(1, 9))
def test_every_item_goes_to_one_rank_and_none_is_busier_than_by_greed(costs: list[int], parts: int) -> None:
    found = assign([(cost,) for cost in costs], parts)
    assert len(found) == parts and sorted(i for items in found for i in items) == list(range(len(costs)))
    busiest = max(sum(costs[i] for i in items) for items in found)
    assert busiest <= greedy(costs, parts, costs) * (1 + 1e-6)  # costs are rounded inside


@pytest.mark.parametrize("parts", [2, 8, 16])
@pytest.mark.parametrize("lengths", [long_tail(1), [32768] * 256], ids=["long_tail", "equal"])
def test_ranks_are_balanced_in_every_phase(lengths: list[int], parts: int) -> None:
    """A third of the responses has no teacher sequence; others have privileged prompts of up to 8,000 tokens."""
    rng = random.Random(2)
    taught = [flops(n + rng.randrange(500, 8000)) if rng.random() < 0.67 else 0 for n in lengths]
    costs = [(3 * flops(n), teacher) for n, teacher in zip(lengths, taught, strict=True)]
    found = assign(costs, parts)
    busiest = [max(sum(costs[i][phase] for i in items) for items in found) for phase in range(2)]
    mean = [sum(cost[phase] for cost in costs) / parts for phase in range(2)]
    assert sum(busiest) <= 1.005 * sum(mean)
    if len(set(lengths)) > 1:
        tokens = [n if teacher == 0 else 2 * n for n, teacher in zip(lengths, taught, strict=True)]
        assert sum(busiest) < greedy(tokens, parts, [sum(cost) for cost in costs])  # balanced by tokens


@given(st.lists(st.integers(1, 100), max_size=40), st.integers(20, 130), st.integers(0, 5))
def test_bins_keep_the_budget_and_come_most_expensive_first(lengths: list[int], budget: int, more: int) -> None:
    costs = [n + n * n for n in lengths]
    fewest = first_fit(lengths, budget)
    for bins in (fewest, fill_bins(lengths, costs, budget, len(fewest) + more)):
        assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
        assert all(len(b) == 1 or sum(lengths[i] for i in b) <= budget for b in bins)
    work = [sum(costs[i] for i in b) for b in bins]
    assert len(bins) <= len(fewest) + more and work == sorted(work, reverse=True)


def test_packs_are_as_even_as_their_longest_sequence_allows() -> None:
    lengths = long_tail(3)
    costs = [flops(n) for n in lengths]
    fewest = first_fit(lengths, 65536)
    assert len(fewest) == -(-sum(lengths) // 65536)
    bins = fill_bins(lengths, costs, 65536, len(fewest))
    busiest = max(sum(costs[i] for i in items) for items in bins)
    assert len(bins) == len(fewest)
    assert busiest <= 1.02 * max(sum(costs) / len(bins), max(costs))
    assert busiest < max(sum(costs[i] for i in items) for items in fewest)


def test_a_pipeline_begins_and_ends_with_cheap_packs() -> None:
    assert cheap_ends([9, 7, 5, 3, 1]) == [1, 5, 9, 7, 3] and cheap_ends([2, 1]) == [1, 2] and cheap_ends([]) == []

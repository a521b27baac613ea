"""Prefix sharing: the path from the root spells every sequence completely, and nothing is laid out twice."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asd_megatron.trainer import prefixes
from asd_megatron.trainer.prefixes import (
    BLOCK,
    Item,
    Segments,
    bin_consecutive,
    build_tree,
    fewest_bins,
    separate,
    sort_by_prefix,
    unique_spans,
)

SEQUENCES = st.lists(
    st.lists(st.integers(0, 1), min_size=0, max_size=6).map(lambda blocks: sum(([b] * 9 for b in blocks), [7])),
    min_size=1,
    max_size=9,
)


def _check(segments: Segments, sequences: list[list[int]]) -> None:
    segment_of = {
        token: i for i, (a, e) in enumerate(zip(segments.cu, segments.cu[1:], strict=False)) for token in range(a, e)
    }
    for ids, where in zip(sequences, segments.where, strict=True):
        assert segments.ids[where].tolist() == list(ids)
        assert segments.positions[where].tolist() == list(range(len(ids)))
        path = list(dict.fromkeys(segment_of[token] for token in where.tolist()))
        for parent, child in zip([-1, *path], path, strict=False):
            assert segments.parents[child] == parent  # so a token's ancestors are its sequence's earlier tokens
        assert sum(segments.cu[i + 1] - segments.cu[i] for i in path) == len(ids)


@settings(deadline=None, max_examples=200)
@given(SEQUENCES)
def test_every_sequence_is_complete_and_shared_segments_are_not_short(sequences: list[list[int]]) -> None:
    found = build_tree(sequences)
    _check(found, sequences)
    assert found.cu[-1] == len(found.ids) == sum(n for _, n in unique_spans(sequences)) <= sum(map(len, sequences))
    inner = {p for p in found.parents if p >= 0}
    assert all(found.cu[i + 1] - found.cu[i] >= BLOCK for i in inner)


def test_a_group_computes_its_prompt_once_and_demonstrations_branch() -> None:
    rng = random.Random(1)
    draw = lambda n: [rng.randrange(100) for _ in range(n)]  # noqa: E731
    prompt, first, second = draw(3 * BLOCK), draw(2 * BLOCK), draw(2 * BLOCK)
    first[0], second[0] = 1, 2
    sequences = [prompt + (second if i == 2 else first) + [i] + draw(11) for i in range(5)]
    found = build_tree(sequences)
    _check(found, sequences)
    assert found.cu[-1] == 3 * BLOCK + 2 * (2 * BLOCK) + 5 * 12
    assert sorted(found.parents) == [-1, 0, 0, 1, 1, 1, 1]  # prompt, two demonstrations, five responses


def test_separate_sequences_share_nothing() -> None:
    found = separate([[1, 2, 3], [1, 2, 3, 4]])
    assert found.cu == [0, 3, 7] and found.parents == (-1, -1)
    _check(found, [[1, 2, 3], [1, 2, 3, 4]])


def test_padding_stays_behind_the_last_segment() -> None:
    found = build_tree([[1] * 20, [1] * 20 + [2]]).padded(3, 9)
    assert found.ids[-3:].tolist() == [9, 9, 9] and found.cu[-1] == len(found.ids)
    assert len(found.cu) - 2 not in found.parents
    assert found.positions[-4:].tolist() == list(range(int(found.positions[-4]), int(found.positions[-4]) + 4))


def items_of(sequences: list[list[int]]) -> tuple[list[int], list[Item]]:
    """(order, items) of sequences whose tokens cost as much as their position."""
    indices, shared = sort_by_prefix(sequences)
    cost = lambda start, end: sum(range(start, end))  # noqa: E731
    ends = [len(sequences[i]) for i in indices]
    return indices, [Item(n - s, n, cost(s, n), cost(0, n)) for s, n in zip(shared, ends, strict=True)]


@pytest.mark.parametrize("more", [0, 1, 4])
@pytest.mark.parametrize("seed", range(5))
def test_bins_keep_the_budget_and_are_about_equally_expensive(seed: int, more: int) -> None:
    rng = random.Random(seed)
    sequences = [[rng.randrange(3)] * 32 + [rng.randrange(9) for _ in range(rng.randrange(1, 60))] for _ in range(23)]
    indices, items = items_of(sequences)
    count = fewest_bins(items, 200) + more
    bins = bin_consecutive(items, 200, count)
    assert [place for places in bins for place in places] == list(range(23)) and len(bins) <= count
    spans = [unique_spans([sequences[indices[place]] for place in places]) for places in bins]
    assert max(sum(length for _, length in of_bin) for of_bin in spans) <= 200
    work = [sum(sum(range(start, start + length)) for start, length in of_bin) for of_bin in spans]
    assert len(prefixes._fill(items, 200, max(work) - 1)) > count  # no smaller bound would do with so many bins


def test_a_sequence_longer_than_the_budget_has_a_bin_of_its_own() -> None:
    items = [Item(n, n, n, n) for n in (5, 90, 5)]
    assert bin_consecutive(items, 20, 3) == [range(0, 1), range(1, 2), range(2, 3)]
    assert bin_consecutive([], 20, 1) == []
    assert build_tree([]).ids.shape == (0,) and build_tree([]).ids.dtype == "int64"


def test_an_order_that_is_known_gives_the_same_build_tree() -> None:
    rng = random.Random(3)
    sequences = [[rng.randrange(2)] * 20 + [rng.randrange(3)] * 20 + [i] for i in range(9)]
    indices, shared = sort_by_prefix(sequences)
    known = build_tree([sequences[i] for i in indices], shared)
    _check(known, [sequences[i] for i in indices])
    assert known.parents == build_tree(sequences).parents and known.ids.tolist() == build_tree(sequences).ids.tolist()

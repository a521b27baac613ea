"""Sequences that begin alike, laid out as a tree: a stretch of tokens that several of them share is computed once.

In a causal model a token's hidden states depend on what stands before it alone, so all responses to a prompt, and all
prompts that begin with the same examples or the same demonstration, may continue one copy of it. Losses and gradients
are those of the separate sequences.

Prefixes are shared in whole blocks of BLOCK tokens, so that no stretch is shorter than that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BLOCK = 16


@dataclass(frozen=True)
class Segments:
    """Consecutive stretches of a pack's tokens.

    `ids`, `positions` int64 [T]; stretch i is `ids[cu[i]:cu[i + 1]]` and continues stretch `parents[i]`, which lies
    before it (-1: it begins a sequence). `where[k]` int64 is the place of each token of sequence k. Arrays, since with
    tensors laying out a small model's pack takes as long as a layer.
    """

    ids: np.ndarray
    positions: np.ndarray
    cu: list[int]
    parents: tuple[int, ...]
    where: list[np.ndarray]

    def padded(self, tokens: int, pad_id: int) -> Segments:
        """With `tokens` more at the end of the last stretch, which is nobody's parent."""
        more = np.arange(tokens)
        positions = np.concatenate([self.positions, more + (self.positions[-1:] + 1)])
        ids = np.concatenate([self.ids, np.full_like(more, pad_id)])
        return Segments(ids, positions, [*self.cu[:-1], self.cu[-1] + tokens], self.parents, self.where)


def separate(sequences: Sequence[Sequence[int]]) -> Segments:
    """One stretch a sequence, in their order; nothing is shared."""
    cu = [0]
    for ids in sequences:
        cu.append(cu[-1] + len(ids))
    return Segments(
        ids=joined([np.asarray(ids, dtype=np.int64) for ids in sequences]),
        positions=joined([np.arange(len(ids)) for ids in sequences]),
        cu=cu,
        parents=(-1,) * len(sequences),
        where=[np.arange(a, e) for a, e in zip(cu, cu[1:], strict=False)],
    )


def joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """One int64 array; of no parts an empty one."""
    return np.concatenate([np.zeros(0, dtype=np.int64), *parts])


def order(sequences: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """(indices in lexicographic order, for each place the tokens shared with the place before: whole blocks)."""
    indices = sorted(range(len(sequences)), key=lambda i: tuple(sequences[i]))
    arrays = [np.asarray(sequences[i], dtype=np.int64) for i in indices]
    shared = [0] * len(indices)
    for place in range(1, len(indices)):
        a, b = arrays[place - 1], arrays[place]
        n = min(len(a), len(b))
        different = np.flatnonzero(a[:n] != b[:n])
        shared[place] = int(different[0] if len(different) else n) // BLOCK * BLOCK
    return indices, shared


def count(sequences: Sequence[Sequence[int]]) -> int:
    """Tokens that are left to compute when the sequences share their prefixes."""
    indices, shared = order(sequences)
    return sum(len(sequences[i]) for i in indices) - sum(shared)


def tree(sequences: Sequence[Sequence[int]], shared: Sequence[int] | None = None) -> Segments:
    """The sequences with every common prefix laid out once.

    `shared`: for sequences in the order of `order`, what it says they share, if that is known already.
    """
    indices: Sequence[int] = range(len(sequences))
    if shared is None:
        indices, shared = order(sequences)
    where: list[np.ndarray] = [joined([])] * len(sequences)
    cu, parents = [0], []
    ids, positions = [], []
    path: list[tuple[int, int]] = []  # (stretch, the depth at which it ends) of the sequence in hand
    before = joined([])
    for place, index in enumerate(indices):
        start, length = shared[place], len(sequences[index])
        while path and path[-1][1] > start:
            path.pop()
        for a, e in _cuts(shared, place, length):
            parents.append(path[-1][0] if path else -1)
            path.append((len(parents) - 1, e))
            cu.append(cu[-1] + e - a)
        ids.append(np.asarray(sequences[index][start:], dtype=np.int64))
        positions.append(np.arange(start, length))
        before = where[index] = np.concatenate([before[:start], np.arange(cu[-1] - (length - start), cu[-1])])
    return Segments(joined(ids), joined(positions), cu, tuple(parents), where)


def _cuts(shared: Sequence[int], place: int, length: int) -> list[tuple[int, int]]:
    """The own part of a sequence, cut where later ones leave it: (start, end) depths."""
    start, deepest = shared[place], length
    ends = {length}
    for later in shared[place + 1 :]:
        deepest = min(deepest, later)
        if deepest <= start:
            break
        ends.add(deepest)
    depths = [start, *sorted(ends - {start})]
    return list(zip(depths, depths[1:], strict=False))


def cut(own: Sequence[int], whole: Sequence[int], budget: int, at_least: int = 1) -> list[range]:
    """Consecutive places into bins of at most `budget` tokens, about equally full.

    A bin's first sequence costs its `whole` length, each further one what is its `own`; one that is longer than the
    budget gets a bin of its own. There are at least `at_least` bins if there are as many sequences and that keeps
    the budget.
    """
    bins = _fill(own, whole, budget)
    wanted = max(len(bins), min(at_least, len(own)))
    low, high = 1, budget  # the smallest capacity that is enough for so many bins
    while low < high:
        middle = (low + high) // 2
        if len(_fill(own, whole, middle)) <= wanted:
            high = middle
        else:
            low = middle + 1
    return _fill(own, whole, low)


def _fill(own: Sequence[int], whole: Sequence[int], capacity: int) -> list[range]:
    bins: list[range] = []
    load = first = 0
    for place in range(len(own)):
        if place > first and load + own[place] > capacity:
            bins.append(range(first, place))
            first = place
        load = whole[place] if place == first else load + own[place]
    return [*bins, range(first, len(own))] if len(own) else bins

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
import torch
from torch import Tensor

BLOCK = 16


@dataclass(frozen=True)
class Segments:
    """Consecutive stretches of a pack's tokens.

    `ids`, `positions` int64 [T]; stretch i is `ids[cu[i]:cu[i + 1]]` and continues stretch `parents[i]`, which lies
    before it (-1: it begins a sequence). `where[k]` int64 is the place of each token of sequence k.
    """

    ids: Tensor
    positions: Tensor
    cu: list[int]
    parents: tuple[int, ...]
    where: list[Tensor]

    def padded(self, tokens: int, pad_id: int) -> Segments:
        """With `tokens` more at the end of the last stretch, which is nobody's parent."""
        more = torch.arange(tokens)
        positions = torch.cat([self.positions, more + (self.positions[-1:] + 1)])
        ids = torch.cat([self.ids, torch.full_like(more, pad_id)])
        return Segments(ids, positions, [*self.cu[:-1], self.cu[-1] + tokens], self.parents, self.where)


def separate(sequences: Sequence[Sequence[int]]) -> Segments:
    """One stretch a sequence, in their order; nothing is shared."""
    cu = [0]
    for ids in sequences:
        cu.append(cu[-1] + len(ids))
    empty = torch.zeros(0, dtype=torch.int64)
    return Segments(
        ids=torch.cat([empty, *(torch.tensor(ids, dtype=torch.int64) for ids in sequences)]),
        positions=torch.cat([empty, *(torch.arange(len(ids)) for ids in sequences)]),
        cu=cu,
        parents=(-1,) * len(sequences),
        where=[torch.arange(a, e) for a, e in zip(cu, cu[1:], strict=False)],
    )


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


def tree(sequences: Sequence[Sequence[int]]) -> Segments:
    """The sequences with every common prefix laid out once."""
    indices, shared = order(sequences)
    where: list[Tensor] = [torch.zeros(0, dtype=torch.int64)] * len(sequences)
    cu, parents = [0], []
    ids, positions = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, dtype=torch.int64)]
    path: list[tuple[int, int]] = []  # (stretch, the depth at which it ends) of the sequence in hand
    before = where[0] if where else torch.zeros(0, dtype=torch.int64)
    for place, index in enumerate(indices):
        start, length = shared[place], len(sequences[index])
        while path and path[-1][1] > start:
            path.pop()
        for a, e in _cuts(shared, place, length):
            parents.append(path[-1][0] if path else -1)
            path.append((len(parents) - 1, e))
            cu.append(cu[-1] + e - a)
        new = torch.tensor(sequences[index][start:], dtype=torch.int64)
        ids.append(new)
        positions.append(torch.arange(start, length))
        before = torch.cat([before[:start], torch.arange(cu[-1] - len(new), cu[-1])])
        where[index] = before
    return Segments(torch.cat(ids), torch.cat(positions), cu, tuple(parents), where)


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

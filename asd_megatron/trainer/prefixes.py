"""Prefix sharing (tree attention): sequences with common prefixes laid out as a tree of segments, each computed once.

In a causal model a token's hidden state depends on the tokens before it alone. All responses to a prompt, and all
prompts that begin with the same examples or the same demonstration, may therefore continue one copy of their common
prefix. Losses and gradients equal those of separate sequences. With a prompt P and responses A, B and C:

    separate            P A | P B | P C                 3 |P| + |A| + |B| + |C| tokens
    tree                P | A | B | C                   |P| + |A| + |B| + |C| tokens
    parents             -1  0   0   0                   each response continues segment 0
    positions           0.. |P|.. |P|.. |P|..           as in the separate sequence

A token attends to the tokens before it in its own segment and to all segments on the path to the root.

Prefixes are shared in multiples of BLOCK tokens, so that no segment that has children is shorter than that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from asd_megatron.records import TokenIds

BLOCK = 16


@dataclass(frozen=True)
class Segments:
    """The tokens of a pack as consecutive segments, the nodes of a forest of prefixes.

    Segment i is `ids[cu[i]:cu[i + 1]]` and continues segment `parents[i]` < i (-1: it begins a sequence). `where[k][t]`
    is the place in `ids` of token t of sequence k: places of several sequences coincide in a shared prefix. NumPy
    arrays, because with tensors the layout of a small model's pack takes as long as one of its layers.
    """

    ids: np.ndarray  # int64 [T]
    positions: np.ndarray  # int64 [T], of each token in its sequence
    cu: list[int]  # [segments + 1], boundaries
    parents: tuple[int, ...]
    where: list[np.ndarray]  # int64 [length of the sequence], one array for each sequence

    def padded(self, tokens: int, pad_id: int) -> Segments:
        """With `tokens` padding tokens at the end of the last segment, which has no children."""
        more = np.arange(tokens)
        positions = np.concatenate([self.positions, more + (self.positions[-1:] + 1)])
        ids = np.concatenate([self.ids, np.full_like(more, pad_id)])
        return Segments(ids, positions, [*self.cu[:-1], self.cu[-1] + tokens], self.parents, self.where)


def separate(sequences: Sequence[TokenIds]) -> Segments:
    """One segment for each sequence, in their order; nothing is shared."""
    cu = [0]
    for ids in sequences:
        cu.append(cu[-1] + len(ids))
    return Segments(
        ids=concatenated([np.asarray(ids, dtype=np.int64) for ids in sequences]),
        positions=concatenated([np.arange(len(ids)) for ids in sequences]),
        cu=cu,
        parents=(-1,) * len(sequences),
        where=[np.arange(a, e) for a, e in zip(cu, cu[1:], strict=False)],
    )


def concatenated(parts: Sequence[np.ndarray]) -> np.ndarray:
    """One int64 array; empty if there are no parts."""
    return np.concatenate([np.zeros(0, dtype=np.int64), *parts])


def sort_by_prefix(sequences: Sequence[TokenIds]) -> tuple[list[int], list[int]]:
    """Lexicographic order, in which each sequence stands next to those it shares most with.

    Returns (indices of the sequences in that order, for each place the tokens shared with the place before, in
    multiples of BLOCK).
    """
    # Big-endian bytes of numbers that are not negative compare as the numbers do, at the speed of memory.
    keys = [np.asarray(ids, dtype=">i4").tobytes() for ids in sequences]
    indices = sorted(range(len(sequences)), key=keys.__getitem__)
    arrays = [np.asarray(sequences[i], dtype=np.int32) for i in indices]
    shared = [0] * len(indices)
    for place in range(1, len(indices)):
        a, b = arrays[place - 1], arrays[place]
        n = min(len(a), len(b))
        different = np.flatnonzero(a[:n] != b[:n])
        shared[place] = int(different[0] if len(different) else n) // BLOCK * BLOCK
    return indices, shared


def unique_spans(sequences: Sequence[TokenIds]) -> tuple[tuple[int, int], ...]:
    """What to compute when the sequences share their prefixes: (position of the first token, tokens) of each."""
    indices, shared = sort_by_prefix(sequences)
    return tuple((start, len(sequences[i]) - start) for i, start in zip(indices, shared, strict=True))


def build_tree(sequences: Sequence[TokenIds], shared: Sequence[int] | None = None) -> Segments:
    """The sequences with every common prefix laid out once.

    `shared`: when the sequences are in the order of `sort_by_prefix` already, the shared lengths that it returned.

    Each sequence in turn adds the tokens beyond what it shares with the one before, cut into segments where later
    sequences branch off. The path from the root to the latest leaf is all that the next sequence can attach to. For
    lengths 80, 64 and 96 that share 32 (second with first) and 48 (third with second):

        sequence  shared  new tokens    segments (depth)                   path afterwards
        0          0      0 to 80       s0 0-32, s1 32-80                  s0 s1
        1         32      32 to 64      s2 32-48, s3 48-64, parent s0      s0 s2 s3
        2         48      48 to 96      s4 48-96, parent s2                s0 s2 s4

        0 ---s0--- 32 ---s1--------------- 80
                    \\--s2-- 48 --s3-- 64
                              \\--s4---------------- 96
    """
    indices: Sequence[int] = range(len(sequences))
    if shared is None:
        indices, shared = sort_by_prefix(sequences)
    where: list[np.ndarray] = [concatenated([])] * len(sequences)
    cu, parents = [0], []
    ids, positions = [], []
    path: list[tuple[int, int]] = []  # (segment, depth at which it ends), root first
    before = concatenated([])  # `where` of the sequence before
    for place, index in enumerate(indices):
        start, length = shared[place], len(sequences[index])
        while path and path[-1][1] > start:
            path.pop()
        for a, e in _branch_cuts(shared, place, length):
            parents.append(path[-1][0] if path else -1)
            path.append((len(parents) - 1, e))
            cu.append(cu[-1] + e - a)
        ids.append(np.asarray(sequences[index][start:], dtype=np.int64))
        positions.append(np.arange(start, length))
        before = where[index] = np.concatenate([before[:start], np.arange(cu[-1] - (length - start), cu[-1])])
    return Segments(concatenated(ids), concatenated(positions), cu, tuple(parents), where)


def _branch_cuts(shared: Sequence[int], place: int, length: int) -> list[tuple[int, int]]:
    """(start, end) depths of the segments that the sequence at `place` adds.

    A later sequence branches off this one at the smallest `shared` between them, if that lies inside the new tokens. In
    the example of `build_tree`, sequence 1 adds depths 32 to 64 and sequence 2 leaves it at 48: (32, 48), (48, 64).
    """
    start, deepest = shared[place], length
    ends = {length}
    for later in shared[place + 1 :]:
        deepest = min(deepest, later)
        if deepest <= start:
            break
        ends.add(deepest)
    depths = [start, *sorted(ends - {start})]
    return list(zip(depths, depths[1:], strict=False))


class Item(NamedTuple):
    """A sequence among its neighbours in the order of `sort_by_prefix`. What it adds to a pack: `own_*` behind the
    sequence before it, whose tokens it shares, and all of it at the beginning of a pack."""

    own_tokens: int
    tokens: int
    own_flops: int
    flops: int


def bin_consecutive(items: Sequence[Item], budget: int, count: int) -> list[range]:
    """Consecutive places into at most `count` bins of at most `budget` tokens (a longer sequence alone), the most
    expensive of which has as few FLOPs as possible. `count` is at least `fewest_bins`.

        tokens    80 64 96 30      own_tokens  80 32 48 30      budget 120, count 3
        bins      [80 + 32] [96] [30]: the first sequence of the second bin adds its complete 96, not 48
    """
    low, high = 0, sum(item.flops for item in items)  # bisection: the smallest bound that needs no more bins
    while low < high:
        middle = (low + high) // 2
        if len(_fill(items, budget, middle)) <= count:
            high = middle
        else:
            low = middle + 1
    return _fill(items, budget, low)


def fewest_bins(items: Sequence[Item], budget: int) -> int:
    return len(_fill(items, budget, sum(item.flops for item in items)))


def _fill(items: Sequence[Item], budget: int, most: int) -> list[range]:
    """Each bin takes the next sequences until one would bring it above `budget` tokens or `most` FLOPs."""
    bins: list[range] = []
    tokens = flops = first = 0
    for place, item in enumerate(items):
        if place > first and (tokens + item.own_tokens > budget or flops + item.own_flops > most):
            bins.append(range(first, place))
            first = place
        if place == first:
            tokens, flops = item.tokens, item.flops
        else:
            tokens, flops = tokens + item.own_tokens, flops + item.own_flops
    return [*bins, range(first, len(items))] if items else bins

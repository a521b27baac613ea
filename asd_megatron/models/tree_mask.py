"""Which tokens of a pack attend to which, as a few numbers for each token and as lists of blocks (NumPy, on the host).

The segments of a prefix tree stand depth first: the tokens that continue a segment, its own and those of all segments
below it, are consecutive. Query q therefore attends to key k when k <= q < end[k], where end[k] is the place after the
last token that continues k's segment. A prompt of 6 tokens and its responses A (2 tokens) and B (3):

    place     0  1  2  3  4  5 | 6  7 | 8  9 10
    end      11 11 11 11 11 11 | 8  8 |11 11 11        B 8 attends to the prompt and itself, not to A: end[6] = 8
    position  0  1  2  3  4  5 | 6  7 | 6  7  8        in the sequence, from the root

A sliding window of w adds position[k] > position[q] - w.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BLOCK = 128
"""Queries and keys of a block, FlexAttention's own size."""


@dataclass(frozen=True)
class Blocks:
    """The pairs of blocks that have to be computed: bool [n, n], queries down, keys across, n = ceil(T / BLOCK), but
    at least 2, so that a compiled kernel sees no size of 1, for which torch compiles another.

    Attributes:
        partial: some queries attend to some keys: the mask decides for each pair of tokens.
        full: every query attends to every key.
    """

    partial: np.ndarray
    full: np.ndarray


class TreeMask:
    """The mask of one pack.

    Attributes:
        tokens: T.
        end, position: int32 [T], see above.
    """

    def __init__(self, boundaries: Sequence[int], parents: Sequence[int]) -> None:
        """`boundaries`, `parents`: `PackedTokens.cu_seqlens` and `.parents` (() for sequences that share nothing).

        Raises ValueError for segments that do not stand depth first.
        """
        self._cu = np.asarray(boundaries, dtype=np.int64)
        lengths = np.diff(self._cu)
        self._paths = _paths(parents or [-1] * len(lengths))
        self._depths = np.array([lengths[path[:-1]].sum() for path in self._paths], dtype=np.int64)
        ends = self._cu[1:].copy()
        for path in self._paths:
            ends[path] = self._cu[path[-1] + 1]  # segments come in order, so the last one below a segment decides
        self.tokens = int(self._cu[-1])
        self.end = np.repeat(ends, lengths).astype(np.int32)
        starts = np.repeat(self._cu[:-1] - self._depths, lengths)
        self.position = (np.arange(self.tokens) - starts).astype(np.int32)

    def seen(self, window: int | None) -> np.ndarray:
        """Every pair of tokens: bool [T, T], queries down, keys across."""
        place = np.arange(self.tokens)
        attend = (place <= place[:, None]) & (place[:, None] < self.end)
        if window is not None:
            attend &= self.position > self.position[:, None] - window
        return attend

    def blocks(self, window: int | None) -> Blocks:
        """Exact, without looking at pairs of tokens: 64K tokens in a thousand segments take some 50 ms.

        The tokens between two cuts, at the ends of segments and of blocks, are one segment's and in one block of
        queries. Positions that any of them attends to are consecutive on its path, and so are those that all of them
        attend to: each is at most one range of places in every segment of the path. What counts is how many keys of a
        block the ranges cover.
        """
        n = max(2, -(-self.tokens // BLOCK))
        cuts = np.union1d(self._cu, np.arange(0, self.tokens, BLOCK))
        first, last = cuts[:-1], cuts[1:] - 1  # queries of a piece
        window = window or self.tokens
        newest = self.position[last].astype(np.int64)
        oldest = self.position[first].astype(np.int64)
        segments = np.searchsorted(self._cu, first, side="right") - 1
        some = self._covered(segments, oldest - window + 1, newest + 1, n) > 0
        every = self._covered(segments, newest - window + 1, oldest + 1, n) == BLOCK
        starts = np.searchsorted(first, np.arange(-(-self.tokens // BLOCK)) * BLOCK)
        some, every = np.logical_or.reduceat(some, starts), np.logical_and.reduceat(every, starts)
        if self.tokens % BLOCK:
            every[-1] = False  # the last block of queries is not complete
        missing = ((0, n - len(some)), (0, 0))
        some, every = np.pad(some, missing), np.pad(every, missing)
        return Blocks(some & ~every, every)

    def _covered(self, segments: np.ndarray, low: np.ndarray, high: np.ndarray, blocks: int) -> np.ndarray:
        """How many keys of each block lie at the positions low <= p < high on the path to a segment: [pieces, blocks],
        for `segments`, `low`, `high` int64 [pieces]."""
        paths = [self._paths[s] for s in segments]
        piece = np.repeat(np.arange(len(paths)), [len(path) for path in paths])
        on_path = np.concatenate(paths)
        depth, place = self._depths[on_path], self._cu[on_path]
        length = self._cu[on_path + 1] - place
        begin = np.clip(low[piece] - depth, 0, length)
        end = np.maximum(np.clip(high[piece] - depth, 0, length), begin)
        steps = np.zeros(len(paths) * (blocks + 2))
        for sign, edge in ((1, place + end), (-1, place + begin)):
            # Keys of block b before `edge`: BLOCK, then `rest` in its own block, then 0. The sum over b of these steps.
            block, rest = np.divmod(edge, BLOCK)
            at = piece * (blocks + 2) + block
            steps += sign * np.bincount(at, rest - BLOCK, len(steps))
            steps -= sign * np.bincount(at + 1, rest, len(steps))
        return steps.reshape(len(paths), blocks + 2).cumsum(1)[:, :blocks]


def listed(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """FlexAttention's form of a bool matrix [rows, columns]: how many entries each row has, int32 [rows], and their
    columns in order, int32 [rows, columns], 0 after them."""
    counts = blocks.sum(1, dtype=np.int32)
    rows, columns = np.nonzero(blocks)
    indices = np.zeros(blocks.shape, dtype=np.int32)
    indices[rows, np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)] = columns
    return counts, indices


def _paths(parents: Sequence[int]) -> list[np.ndarray]:
    """For each segment, the segments from the root to it, its own included."""
    paths: list[np.ndarray] = []
    before: list[int] = []
    for segment, parent in enumerate(parents):
        while before and before[-1] != parent:
            before.pop()
        if parent >= 0 and not before:
            raise ValueError(f"segment {segment} continues segment {parent}, and others that do not stand between them")
        before.append(segment)
        paths.append(np.array(before))
    return paths

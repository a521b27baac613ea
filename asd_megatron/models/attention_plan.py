"""Which queries and keys of a pack attend in one call: packed (THD) sequences, prefix trees, sliding windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

MAX_PADDING = 1.5
"""Rows share one attention call while padding them to the longest multiplies the query-key pairs by at most this."""

SMALL_PADDING = 8192
"""Query-key pairs of padding that cost less than another call, whatever the factor."""

MAX_CROSS_PAIRS = 1.5
"""Sibling segments share a row, and with it one copy of the keys before them, while the masked cross-segment pairs
multiply the row's query-key pairs by at most this."""


@dataclass(frozen=True)
class AttentionBucket:
    """Rows of similar size that attend in one padded call of scaled_dot_product_attention.

    A row is one segment of the pack, or several siblings (segments with the same parent). Its keys are the tokens on
    the path from the root to the parent, then its own tokens. Example: a prompt of 6 tokens and its responses A (2
    tokens) and B (3), so `cu_seqlens` 0 6 8 11 and `parents` (-1, 0, 0). A and B share a row:

        queries  6 7 8 9 10 -        valid  1 1 1 1 1 0        row 0: A and B
                 0 1 2 3 4  5               1 1 1 1 1 1        row 1: the prompt
        keys     0 1 2 3 4 5 6 7 8 9 10
                 0 1 2 3 4 5 - - - - -

        mask of row 0    0 1 2 3 4 5 | 6 7 | 8 9 10            (queries down, keys across)
            A  6         1 1 1 1 1 1 | 1 . | . . .
               7         1 1 1 1 1 1 | 1 1 | . . .
            B  8         1 1 1 1 1 1 | . . | 1 . .             cross-segment pairs (B, A) are computed and masked
               9         1 1 1 1 1 1 | . . | 1 1 .
              10         1 1 1 1 1 1 | . . | 1 1 1

    With a sliding window a query attends only to that many newest positions: window 4 leaves B 8 (position 6) the keys
    3 4 5 and itself.

    Attributes:
        queries, keys: int64 [n, S] and [n, K], places in the pack; 0 in the padding. valid: bool [n, S].
        mask: bool [n, 1, S, K] (True: attend); or torch's lower-right causal bias, where all rows are one segment of
            the same size; or None (causal), where no row has a parent.
    """

    queries: Tensor
    keys: Tensor
    valid: Tensor
    mask: Any


@dataclass
class _SegmentRow:
    """A row of a bucket before padding. `path`: int64, tokens on the path from the root to the segments' parent."""

    path: np.ndarray
    spans: list[tuple[int, int]]  # (first token, end) of each segment
    queries: int
    pairs: int  # query-key pairs within each segment and with the path; the causal half is not subtracted

    @property
    def keys(self) -> int:
        return len(self.path) + self.queries

    @property
    def own(self) -> np.ndarray:
        return np.concatenate([np.arange(a, e) for a, e in self.spans])

    @property
    def segment_starts(self) -> np.ndarray:
        """For each query, where its segment begins among the row's own tokens: 0 0 2 2 2 for A and B above."""
        lengths = [e - a for a, e in self.spans]
        return np.repeat(np.cumsum([0, *lengths[:-1]]), lengths)


def plan_buckets(
    cu_seqlens: Sequence[int], parents: Sequence[int], device: torch.device, window: int | None = None
) -> list[AttentionBucket]:
    """Group a pack's segments into rows, and rows of similar size into buckets. `cu_seqlens`, `parents` as in
    `PackedTokens`: `parents` () for sequences that share nothing."""
    return [_bucket(rows, device, window) for rows in _by_size(_rows(cu_seqlens, parents))]


class AttentionPlan:
    """The buckets of one pack, computed once for all layers with the same window."""

    def __init__(self, cu_seqlens: Sequence[int], parents: Sequence[int], device: torch.device) -> None:
        self._pack = (cu_seqlens, parents, device)
        self._buckets: dict[int | None, list[AttentionBucket]] = {}

    def buckets(self, window: int | None) -> list[AttentionBucket]:
        if window not in self._buckets:
            self._buckets[window] = plan_buckets(*self._pack, window)
        return self._buckets[window]


def _rows(cu_seqlens: Sequence[int], parents: Sequence[int]) -> list[_SegmentRow]:
    """Each segment starts a row or joins the latest row with the same parent."""
    rows: list[_SegmentRow] = []
    latest: dict[int, _SegmentRow] = {}  # by parent
    paths: list[np.ndarray] = []  # of each segment, its own tokens included
    nothing = np.zeros(0, dtype=np.int64)
    for i, (a, e) in enumerate(zip(cu_seqlens, cu_seqlens[1:], strict=False)):
        parent = parents[i] if parents else -1
        path = paths[parent] if parent >= 0 else nothing
        if parents:
            paths.append(np.concatenate([path, np.arange(a, e)]))
        length, pairs = e - a, (e - a) * (len(path) + e - a)
        row = latest.get(parent) if parent >= 0 else None
        if row is not None and _joins(row, length, pairs):
            row.spans.append((a, e))
            row.queries, row.pairs = row.queries + length, row.pairs + pairs
        else:
            rows.append(_SegmentRow(path, [(a, e)], length, pairs))
            latest[parent] = rows[-1]
    return rows


def _joins(row: _SegmentRow, length: int, pairs: int) -> bool:
    """Whether a segment of `length` tokens joins the row. B joins A above: 5 * (6 + 5) = 55 <= 1.5 * (16 + 27)."""
    queries = row.queries + length
    return queries * (len(row.path) + queries) <= MAX_CROSS_PAIRS * (row.pairs + pairs)


def _by_size(rows: list[_SegmentRow]) -> list[list[_SegmentRow]]:
    """Rows from the largest down, into buckets that waste little on padding."""
    buckets: list[list[_SegmentRow]] = []
    most_keys = most_queries = used = 0  # of the latest bucket; `used`: its query-key pairs without padding
    for row in sorted(rows, key=lambda r: (r.keys, r.queries), reverse=True):
        pairs = row.keys * row.queries
        padded = (len(buckets[-1]) + 1) * most_keys * max(most_queries, row.queries) if buckets else 0
        if buckets and padded <= max(MAX_PADDING * (used + pairs), used + pairs + SMALL_PADDING):
            buckets[-1].append(row)
            most_queries, used = max(most_queries, row.queries), used + pairs
        else:
            buckets.append([row])
            most_keys, most_queries, used = row.keys, row.queries, pairs
    return buckets


def _bucket(rows: list[_SegmentRow], device: torch.device, window: int | None) -> AttentionBucket:
    # NumPy: with tensors, planning a small pack would take as long as its attention.
    width, length = max(r.keys for r in rows), max(r.queries for r in rows)
    queries, starts = np.zeros((2, len(rows), length), dtype=np.int64)
    for i, row in enumerate(rows):
        queries[i, : row.queries] = row.own
    at = np.arange(length)
    valid = torch.from_numpy(at < np.array([[r.queries] for r in rows])).to(device)
    query_places = torch.from_numpy(queries).to(device)
    depths = np.array([[len(r.path)] for r in rows])
    if window is not None and window >= width:
        window = None
    if not depths.any() and window is None:
        return AttentionBucket(query_places, query_places, valid, None)
    keys = np.zeros((len(rows), width), dtype=np.int64)
    for i, row in enumerate(rows):
        keys[i, : len(row.path)] = row.path
        keys[i, len(row.path) : row.keys] = queries[i, : row.queries]
    mask: Any
    single = all(len(r.spans) == 1 for r in rows)
    if single and window is None and len({(r.keys, r.queries) for r in rows}) == 1:
        mask = _lower_right(length, width, device)
    else:
        attend = np.arange(width) <= (depths + at)[..., None]
        own = np.arange(width) - depths  # [n, K]: place among the row's own tokens, negative on the path
        if not single:
            for i, row in enumerate(rows):
                starts[i, : row.queries] = row.segment_starts
            attend &= (own[:, None] < 0) | (own[:, None] >= starts[..., None])
        if window is not None:
            # Positions, from the root: of a query depth + its place in its segment, of a key on the path its place.
            query_positions = (depths + at - starts)[..., None]
            key_positions = np.where(
                own[:, None] < 0, np.arange(width), depths[..., None] + own[:, None] - starts[..., None]
            )
            attend &= key_positions > query_positions - window
            attend[..., 0] |= ~attend.any(-1)
        # Queries in the padding attend to something too: a softmax over nothing would be NaN.
        mask = torch.from_numpy(attend[:, None]).to(device)
    return AttentionBucket(query_places, torch.from_numpy(keys).to(device), valid, mask)


def _lower_right(length: int, width: int, device: torch.device) -> Any:
    """The mask of `length` queries that are the newest of `width` tokens: query i attends to all but the last
    length - 1 - i keys. On CUDA in the form that flash attention takes without a tensor."""
    if device.type == "cuda":
        from torch.nn.attention.bias import causal_lower_right  # imports torch.compile's machinery: seconds

        return causal_lower_right(length, width)
    return torch.ones(length, width, dtype=torch.bool, device=device).tril(width - length)

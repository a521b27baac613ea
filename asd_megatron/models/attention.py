"""Core attention without Transformer Engine: packed (THD) sequences, prefix trees, context parallelism, and the hook
for the key/value cache of the sampler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from asd_megatron.records import PackedTokens

MAX_PADDING = 1.5
"""Rows share one attention call while padding them to the longest multiplies the query-key pairs by at most this."""

SMALL_PADDING = 8192
"""Query-key pairs of padding that cost less than another call, whatever the factor."""

MAX_CROSS_PAIRS = 1.5
"""Sibling segments share a row, and with it one copy of the keys before them, while the masked cross-segment pairs
multiply the row's query-key pairs by at most this."""

MIN_ROWS = 4
"""Fewest rows of a matrix product. For fewer, a CPU's BLAS takes other kernels, which sum in another order: a sample's
numbers would then depend on how many others are in its batch."""


class Attends(Protocol):
    """Attention as `models.decoder` calls it: over the sampler's key/value cache, or over a pack (`PackAttention`)."""

    def attend(
        self,
        layer_number: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        softmax_scale: float,
        window: int | None = None,
    ) -> Tensor:
        """query [s, B, hkv, h / hkv, d], key and value [s, B, hkv, d], after RoPE. `window`: the newest keys that a
        query attends to, its own included; None: all. Returns [s, B, h * d]."""
        ...


class DecodingCache(Attends, Protocol):
    """The sampler's key/value cache."""

    def newest(self, hidden: Tensor) -> Tensor:
        """Hidden states of each row's newest token, [s, B, H] -> [1, B, H]."""
        ...


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


def attention_operand(x: Tensor) -> Tensor:
    """A query, key or value in the dtype that attention computes in: on a CPU float64 for float32 and float32 for
    bfloat16, otherwise its own.

    A token attends over the cache while it is sampled and over its pack while it is scored, so the sums of attention
    run in different orders; in float32 the layers above amplify that difference (to 3e-5 in SmolLM2-135M's log-probs).
    In float64 both round to the same float32 numbers, and everything else computes a token alike in any batch. It costs
    a tenth of a forward pass on short sequences. For bfloat16 the wider dtype is also faster: a CPU's backward pass
    takes half the time.
    """
    if x.device.type != "cpu":
        return x
    return x.to({torch.float32: torch.float64, torch.bfloat16: torch.float32}.get(x.dtype, x.dtype))


def _attention(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Any = None) -> Tensor:
    """query [n, h, s, d], key and value [n, hkv, t, d]; causal, or by `mask` (True: attend; or torch's causal
    bias)."""
    dtype = query.dtype
    query, key, value = attention_operand(query), attention_operand(key), attention_operand(value)
    repeat, grouped = query.shape[1] // key.shape[1], query.device.type == "cpu"
    if repeat > 1 and not grouped:  # CUDA's kernels that take a mask need a key head for each query head
        key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=repeat > 1 and grouped
    )
    return out.to(dtype)


class SDPACoreAttention(torch.nn.Module):
    """Megatron's core attention by PyTorch's scaled_dot_product_attention, for packed causal sequences.

    Megatron's SelfAttention calls it with query [T, h, d], key and value [T, hkv, d] after RoPE, heads of this
    tensor-parallel rank, and with the pack's boundaries; it returns [T, 1, h * d]. Under context parallelism T counts
    this rank's tokens (`zigzag` of every sequence), and keys and values are gathered over the group. Raises ValueError
    for sequences that are not packed.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        *,
        scale: float,
        window: int | None,
        **_: Any,
    ) -> None:
        """`scale`, `window`: of this layer; `softmax_scale`, Megatron's for all layers, is not read."""
        super().__init__()
        self.layer_number, self.scale, self.window = layer_number, scale, window
        self.cp_group = pg_collection.cp if config.context_parallel_size > 1 else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
        **_: Any,
    ) -> Tensor:
        if packed_seq_params is None:
            raise ValueError("this attention takes packed sequences only")
        if self.cp_group is not None:
            cu_seqlens = packed_seq_params.cu_seqlens_q.tolist()
            out = _context_parallel(query, key, value, cu_seqlens, self.scale, self.window, self.cp_group)
        else:
            out = self._packed(query, key, value, packed_seq_params)
        return out.reshape(len(query), 1, -1)

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, packed: Any) -> Tensor:
        plan = getattr(packed, "plan", None)
        if plan is None:  # all layers of the micro-batch share it
            parents = getattr(packed, "parents", ())
            plan = packed.plan = AttentionPlan(packed.cu_seqlens_q.tolist(), parents, query.device)
        return _attend(query, key, value, plan.buckets(self.window), self.scale)


class PackAttention:
    """Attention over one pack for `models.decoder`, which sees the pack as a batch of one long row."""

    def __init__(self, packed: PackedTokens) -> None:
        self._plan = AttentionPlan(packed.cu_seqlens.tolist(), packed.parents, packed.cu_seqlens.device)

    def attend(
        self,
        layer_number: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        softmax_scale: float,
        window: int | None = None,
    ) -> Tensor:
        """query [T, 1, hkv, h / hkv, d], key and value [T, 1, hkv, d], after RoPE. Returns [T, 1, h * d]."""
        query = query.flatten(2, 3).squeeze(1)
        out = _attend(query, key.squeeze(1), value.squeeze(1), self._plan.buckets(window), softmax_scale)
        return out.reshape(len(query), 1, -1)


def _attend(query: Tensor, key: Tensor, value: Tensor, buckets: Sequence[AttentionBucket], scale: float) -> Tensor:
    """query [T, h, d], key and value [T, hkv, d]. Returns [T, h, d]."""
    rows, values = [], []
    for bucket in buckets:
        q = query[bucket.queries].transpose(1, 2)
        k, v = (x[bucket.keys].transpose(1, 2) for x in (key, value))
        out = _attention(q, k, v, scale, bucket.mask).transpose(1, 2)
        rows.append(bucket.queries[bucket.valid])
        values.append(out[bucket.valid])
    # Restore the pack's order: `argsort` of the places is their inverse permutation.
    return torch.cat(values)[torch.cat(rows).argsort()]


class _GatherContext(torch.autograd.Function):
    """All-gather [T, ...] over the context-parallel ranks to [cp, T, ...]; backward sums over the ranks and keeps this
    rank's slice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        out = x.new_empty((group.size(), *x.shape))
        dist.all_gather_into_tensor(out.view(-1), x.contiguous().view(-1), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad[ctx.group.rank()].contiguous(), None


def zigzag(length: int, size: int, rank: int) -> Tensor:
    """Positions of one sequence that context-parallel rank `rank` of `size` holds: chunks `rank` and
    `2 * size - 1 - rank` of 2 * size, so that all ranks have equally many causal pairs. Int64 [length / size].

    Length 8, size 2: rank 0 holds 0 1 6 7, rank 1 holds 2 3 4 5.
    """
    chunk = length // (2 * size)
    return torch.cat([torch.arange(c * chunk, (c + 1) * chunk) for c in (rank, 2 * size - 1 - rank)])


def _context_parallel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: list[int],
    scale: float,
    window: int | None,
    group: dist.ProcessGroup,
) -> Tensor:
    """This rank's queries of every sequence against the sequence's gathered keys, put back in the order of
    positions."""
    size, rank = group.size(), group.rank()
    both = _GatherContext.apply(torch.stack([key, value], 1), group)  # [cp, T, 2, hkv, d]
    outputs, start = [], 0
    for a, e in zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True):
        length = e - a
        local = length // size
        span = slice(start, start + local)
        order = torch.cat([zigzag(length, size, r) for r in range(size)]).argsort().to(query.device)
        keys = both[:, span].flatten(0, 1)[order].permute(1, 2, 0, 3)[:, None]  # [2, 1, hkv, L, d]
        at = zigzag(length, size, rank).to(query.device)
        places = torch.arange(length, device=query.device)[None]
        mask = places <= at[:, None]
        if window is not None:
            mask &= places > at[:, None] - window
        q = query[span].transpose(0, 1)[None]
        outputs.append(_attention(q, keys[0], keys[1], scale, mask)[0].transpose(0, 1))
        start += local
    return torch.cat(outputs)


@dataclass
class CacheHolder:
    """The cache of the current forward, for all layers. It holds the first `rows` rows of the batch; the others are
    fill (`fill_rows`)."""

    cache: Attends | None = None
    rows: int = 0


class CachedAttention(torch.nn.Module):
    """Replaces a layer's core attention while the embedded engine samples: attends over the engine's cache."""

    holder: CacheHolder

    def __init__(self, holder: CacheHolder, layer_number: int, scale: float, window: int | None) -> None:
        super().__init__()
        self.__dict__["holder"] = holder  # not a submodule, not state
        self.layer_number, self.scale, self.window = layer_number, scale, window

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        assert self.holder.cache is not None
        filled = query.shape[1]
        query, key, value = (x[:, : self.holder.rows] for x in (query, key, value))
        out = self.holder.cache.attend(self.layer_number, query, key, value, self.scale, self.window)
        return fill_rows(out, filled, dim=1)


def fill_rows(x: Tensor, rows: int, dim: int = 0) -> Tensor:
    """`x` with its last row repeated until there are `rows` along `dim`; `x` itself when there are enough."""
    missing = rows - x.shape[dim]
    if missing <= 0:
        return x
    last = x.narrow(dim, x.shape[dim] - 1, 1)
    return torch.cat([x, *[last] * missing], dim)

"""Core attention without Transformer Engine: packed (THD) sequences, context parallelism, the cache while sampling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from asd_megatron.records import PackedTokens

MAX_PADDING = 1.5
"""Rows of a pack share one attention call while padding to the longest costs at most this factor in query-key pairs."""

SMALL = 8192
"""Query-key pairs of padding that are cheaper than another call, whatever the factor."""

MAX_STRANGERS = 1.5
"""Siblings share a row, and with it one copy of the keys before them, while what they must not see of each other costs
at most this factor in query-key pairs."""

MIN_ROWS = 4
"""A CPU's BLAS multiplies fewer rows by other kernels, which add in another order: a sample would see its company."""


@dataclass(frozen=True)
class Bucket:
    """Rows of similar size that attend in one padded call. A row is a stretch, or several that continue the same one.

    `queries` int64 [n, S] and `keys` int64 [n, K] are tokens of the pack (0 in the padding); `valid` bool [n, S]. A
    row's keys are those before it on its way from the root, then its own. `mask`: bool [n, 1, S, K] (True: attend),
    torch's lower-right causal bias where all rows are one stretch of the same size, or None for whole sequences
    (causal).
    """

    queries: Tensor
    keys: Tensor
    valid: Tensor
    mask: Any


@dataclass
class _Row:
    before: np.ndarray  # int64: the tokens on the way from the root
    spans: list[tuple[int, int]]  # of the stretches: their tokens
    queries: int
    pairs: int  # of queries and the keys that they see, the causal half included

    @property
    def keys(self) -> int:
        return len(self.before) + self.queries

    @property
    def own(self) -> np.ndarray:
        return np.concatenate([np.arange(a, e) for a, e in self.spans])

    @property
    def begins(self) -> np.ndarray:
        """For each query where its stretch begins among the row's own tokens."""
        lengths = [e - a for a, e in self.spans]
        return np.repeat(np.cumsum([0, *lengths[:-1]]), lengths)


def plan_buckets(cu_seqlens: Sequence[int], parents: Sequence[int], device: torch.device) -> list[Bucket]:
    """Group a pack's stretches into rows, and rows by size. `parents` as in `PackedTokens`: () for whole sequences."""
    return [_bucket(rows, device) for rows in _alike(_rows(cu_seqlens, parents))]


def _rows(cu_seqlens: Sequence[int], parents: Sequence[int]) -> list[_Row]:
    rows: list[_Row] = []
    last: dict[int, _Row] = {}  # by parent
    ways: list[np.ndarray] = []  # of each stretch, its own tokens included
    nothing = np.zeros(0, dtype=np.int64)
    for i, (a, e) in enumerate(zip(cu_seqlens, cu_seqlens[1:], strict=False)):
        parent = parents[i] if parents else -1
        before = ways[parent] if parent >= 0 else nothing
        if parents:
            ways.append(np.concatenate([before, np.arange(a, e)]))
        length, pairs = e - a, (e - a) * (len(before) + e - a)
        row = last.get(parent) if parent >= 0 else None
        if row is not None and _joins(row, length, pairs):
            row.spans.append((a, e))
            row.queries, row.pairs = row.queries + length, row.pairs + pairs
        else:
            rows.append(_Row(before, [(a, e)], length, pairs))
            last[parent] = rows[-1]
    return rows


def _joins(row: _Row, length: int, pairs: int) -> bool:
    queries = row.queries + length
    return queries * (len(row.before) + queries) <= MAX_STRANGERS * (row.pairs + pairs)


def _alike(rows: list[_Row]) -> list[list[_Row]]:
    groups: list[list[_Row]] = []
    wide = long = used = 0  # of the last group: most keys, most queries, query-key pairs without padding
    for row in sorted(rows, key=lambda r: (r.keys, r.queries), reverse=True):
        pairs = row.keys * row.queries
        together = (len(groups[-1]) + 1) * wide * max(long, row.queries) if groups else 0
        if groups and together <= max(MAX_PADDING * (used + pairs), used + pairs + SMALL):
            groups[-1].append(row)
            long, used = max(long, row.queries), used + pairs
        else:
            groups.append([row])
            wide, long, used = row.keys, row.queries, pairs
    return groups


def _bucket(rows: list[_Row], device: torch.device) -> Bucket:
    # numpy: for small packs the plan would else take as long as the attention
    wide, long = max(r.keys for r in rows), max(r.queries for r in rows)
    queries, begins = np.zeros((2, len(rows), long), dtype=np.int64)
    for i, row in enumerate(rows):
        queries[i, : row.queries] = row.own
    at = np.arange(long)
    valid = at < np.array([[r.queries] for r in rows])
    known = torch.from_numpy(valid).to(device)
    where = torch.from_numpy(queries).to(device)
    depths = np.array([[len(r.before)] for r in rows])
    if not depths.any():
        return Bucket(where, where, known, None)
    keys = np.zeros((len(rows), wide), dtype=np.int64)
    for i, row in enumerate(rows):
        keys[i, : len(row.before)] = row.before
        keys[i, len(row.before) : row.keys] = queries[i, : row.queries]
    mask: Any
    alone = all(len(r.spans) == 1 for r in rows)
    if alone and len({(r.keys, r.queries) for r in rows}) == 1:
        mask = causal_lower_right(long, wide)
    else:
        # padding's queries see something too: the mean of nothing would be no number
        seen = np.arange(wide) <= (depths + at)[..., None]
        if not alone:
            for i, row in enumerate(rows):
                begins[i, : row.queries] = row.begins
            own = np.arange(wide) - depths  # [n, K]: places among the row's own tokens
            seen &= (own[:, None] < 0) | (own[:, None] >= begins[..., None])
        mask = torch.from_numpy(seen[:, None]).to(device)
    return Bucket(where, torch.from_numpy(keys).to(device), known, mask)


def operand(x: Tensor) -> Tensor:
    """A query, key or value in the dtype that attention takes: on a CPU float64 for float32 and float32 for bfloat16,
    else its own.

    A token attends over its cache while it is sampled and over its pack while it is scored, so attention sums in a
    different order; in float32 the layers above blow that up (to 3e-5 in SmolLM2-135M's log-probs). In float64 both
    round to the same float32 numbers, and whatever follows treats a token alike in any batch. It costs a tenth of a
    forward pass on short sequences. For bfloat16 the wider dtype is also the faster one: a CPU's backward pass takes
    half the time.
    """
    if x.device.type != "cpu":
        return x
    return x.to({torch.float32: torch.float64, torch.bfloat16: torch.float32}.get(x.dtype, x.dtype))


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Any = None) -> Tensor:
    """query [n, h, s, d], key and value [n, hkv, t, d]; causal, or by `mask` (True: attend; or torch's causal
    bias)."""
    dtype = query.dtype
    query, key, value = operand(query), operand(key), operand(value)
    repeat, grouped = query.shape[1] // key.shape[1], query.device.type == "cpu"
    if repeat > 1 and not grouped:  # CUDA's kernels that take a mask want a key head for each query head
        key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=repeat > 1 and grouped
    )
    return out.to(dtype)


class SDPACoreAttention(torch.nn.Module):
    """Megatron's core attention by PyTorch's scaled_dot_product_attention, for packed causal sequences.

    Called by Megatron's SelfAttention with query [T, h, d], key and value [T, hkv, d] after RoPE and the pack's
    boundaries; returns [T, 1, h * d]. Under context parallelism T is this rank's share (`zigzag` of every sequence) and
    keys are gathered over the group.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.layer_number = layer_number
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
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
            out = _context_parallel(query, key, value, cu_seqlens, self.scale, self.cp_group)
        else:
            out = self._packed(query, key, value, packed_seq_params)
        return out.reshape(len(query), 1, -1)

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, packed: Any) -> Tensor:
        buckets = getattr(packed, "buckets", None)
        if buckets is None:  # every layer of the micro-batch shares the plan
            parents = getattr(packed, "parents", ())
            buckets = packed.buckets = plan_buckets(packed.cu_seqlens_q.tolist(), parents, query.device)
        return _attend(query, key, value, buckets, self.scale)


class PackAttention:
    """Attention over one pack for `models.decoder`, as the engine's cache attends while it samples."""

    def __init__(self, packed: PackedTokens) -> None:
        self._buckets = plan_buckets(packed.cu_seqlens.tolist(), packed.parents, packed.cu_seqlens.device)

    def attend(self, layer_number: int, query: Tensor, key: Tensor, value: Tensor, softmax_scale: float) -> Tensor:
        """query [T, 1, hkv, h / hkv, d]; key and value [T, 1, hkv, d], after RoPE. Returns [T, 1, h * d]."""
        query = query.flatten(2, 3).squeeze(1)
        out = _attend(query, key.squeeze(1), value.squeeze(1), self._buckets, softmax_scale)
        return out.reshape(len(query), 1, -1)


def _attend(query: Tensor, key: Tensor, value: Tensor, buckets: Sequence[Bucket], scale: float) -> Tensor:
    """query [T, h, d], key and value [T, hkv, d]; [T, h, d]."""
    rows, values = [], []
    for bucket in buckets:
        q = query[bucket.queries].transpose(1, 2)
        k, v = (x[bucket.keys].transpose(1, 2) for x in (key, value))
        out = _causal(q, k, v, scale, bucket.mask).transpose(1, 2)
        rows.append(bucket.queries[bucket.valid])
        values.append(out[bucket.valid])
    # Back to the pack's order by gathering: the inverse permutation.
    return torch.cat(values)[torch.cat(rows).argsort()]


class _GatherContext(torch.autograd.Function):
    """[T, ...] of every context-parallel rank: [cp, T, ...]. Backward sums over the ranks, keeps this rank's share."""

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
    """Positions of one sequence that context-parallel rank `rank` holds: chunks `rank` and `2 * size - 1 - rank`."""
    chunk = length // (2 * size)
    return torch.cat([torch.arange(c * chunk, (c + 1) * chunk) for c in (rank, 2 * size - 1 - rank)])


def _context_parallel(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: list[int], scale: float, group: dist.ProcessGroup
) -> Tensor:
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
        mask = torch.arange(length, device=query.device)[None] <= at[:, None]
        q = query[span].transpose(0, 1)[None]
        outputs.append(_causal(q, keys[0], keys[1], scale, mask)[0].transpose(0, 1))
        start += local
    return torch.cat(outputs)


class CachedAttention(torch.nn.Module):
    """Stands in for a layer's core attention while the embedded engine samples.

    `holder.cache` is the engine's; it knows of the first `holder.rows` rows, others only fill the batch up.
    """

    holder: Any

    def __init__(self, holder: Any, layer_number: int, softmax_scale: float | None) -> None:
        super().__init__()
        self.__dict__["holder"] = holder  # not a submodule, not state
        self.layer_number, self.softmax_scale = layer_number, softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        filled = query.shape[1]
        query, key, value = (x[:, : self.holder.rows] for x in (query, key, value))
        out = self.holder.cache.attend(self.layer_number, query, key, value, self.softmax_scale)
        return fill_rows(out, filled, dim=1)


def fill_rows(x: Tensor, rows: int, dim: int = 0) -> Tensor:
    """`x` with its last row repeated until there are `rows` along `dim`; `x` itself when there are."""
    missing = rows - x.shape[dim]
    if missing <= 0:
        return x
    last = x.narrow(dim, x.shape[dim] - 1, 1)
    return torch.cat([x, *[last] * missing], dim)

"""Core attention without Transformer Engine: packed (THD) sequences, prefix trees, context parallelism, and the hook
for the key/value cache of the sampler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from asd_megatron.models.attention_plan import AttentionBucket, AttentionPlan
from asd_megatron.records import PackedTokens

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


def scaled_dot_product(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Any = None) -> Tensor:
    """PyTorch's attention for query [n, h, s, d], key and value [n, hkv, t, d]; causal, or by `mask` (True: attend; or
    torch's causal bias)."""
    dtype = query.dtype
    query, key, value = attention_operand(query), attention_operand(key), attention_operand(value)
    repeat, grouped = query.shape[1] // key.shape[1], query.device.type == "cpu"
    if repeat > 1 and not grouped:  # CUDA's kernels that take a mask need a key head for each query head
        key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=repeat > 1 and grouped
    )
    return out.to(dtype)


class PackedCoreAttention(torch.nn.Module):
    """Megatron's core attention for packed causal sequences; subclasses compute it.

    Megatron's SelfAttention calls it with query [T, h, d], key and value [T, hkv, d] after RoPE, heads of this
    tensor-parallel rank, and with the pack's `boundaries` and `parents` on `packed_seq_params`
    (`ModelPort.forward`); it returns [T, 1, h * d]. It has no parameters and no state. Raises ValueError for sequences
    that are not packed.
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
        return self._attend(query, key, value, packed_seq_params).reshape(len(query), 1, -1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, packed: Any) -> Tensor:
        """[T, h, d]."""
        raise NotImplementedError


class SDPACoreAttention(PackedCoreAttention):
    """By PyTorch's scaled_dot_product_attention. Under context parallelism T counts this rank's tokens (`zigzag` of
    every sequence), and keys and values are gathered over the group."""

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, packed: Any) -> Tensor:
        if self.cp_group is not None:
            return _context_parallel(query, key, value, packed.boundaries, self.scale, self.window, self.cp_group)
        plan = getattr(packed, "plan", None)
        if plan is None:  # all layers of the micro-batch share it
            plan = packed.plan = AttentionPlan(packed.boundaries, packed.parents, query.device)
        return _attend(query, key, value, plan.buckets(self.window), self.scale)


class PackAttention:
    """Attention over one pack for `models.decoder`, which sees the pack as a batch of one long row."""

    def __init__(self, packed: PackedTokens) -> None:
        self._plan = AttentionPlan(packed.host_boundaries(), packed.parents, packed.cu_seqlens.device)

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
        out = self._attend(query, key.squeeze(1), value.squeeze(1), softmax_scale, window)
        return out.reshape(len(query), 1, -1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        """query [T, h, d], key and value [T, hkv, d]. Returns [T, h, d]."""
        return _attend(query, key, value, self._plan.buckets(window), scale)


def _attend(query: Tensor, key: Tensor, value: Tensor, buckets: Sequence[AttentionBucket], scale: float) -> Tensor:
    """query [T, h, d], key and value [T, hkv, d]. Returns [T, h, d]."""
    rows, values = [], []
    for bucket in buckets:
        q = query[bucket.queries].transpose(1, 2)
        k, v = (x[bucket.keys].transpose(1, 2) for x in (key, value))
        out = scaled_dot_product(q, k, v, scale, bucket.mask).transpose(1, 2)
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
    boundaries: Sequence[int],
    scale: float,
    window: int | None,
    group: dist.ProcessGroup,
) -> Tensor:
    """This rank's queries of every sequence against the sequence's gathered keys, put back in the order of
    positions."""
    size, rank = group.size(), group.rank()
    both = _GatherContext.apply(torch.stack([key, value], 1), group)  # [cp, T, 2, hkv, d]
    outputs, start = [], 0
    for a, e in zip(boundaries[:-1], boundaries[1:], strict=True):
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
        outputs.append(scaled_dot_product(q, keys[0], keys[1], scale, mask)[0].transpose(0, 1))
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

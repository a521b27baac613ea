"""The inference forward, for sampling and scoring: without gradients and without Megatron's modules, over the live
parameters of a chunk.

It repeats the training forward operation by operation, so that a token's hidden state is the same number when it is
sampled, scored and trained.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from asd_megatron.models.attention import Attends, fill_rows
from asd_megatron.models.experts import ExpertMixture, gathered_experts
from asd_megatron.models.family import ModelShape
from asd_megatron.models.layers import softmax_scale
from asd_megatron.models.norm import projection_norm
from asd_megatron.models.rope import Rotation
from asd_megatron.ops.softmax_tile import Targets, merged
from asd_megatron.ops.tile_kernels import tile_kernels


class Stack(Protocol):
    """Inference forward of a chunk: its embedding, on the first pipeline stage, and its layers."""

    def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """ids and positions int64 [B, s] -> hidden states [s, B, H]."""
        ...

    def run(self, hidden: Tensor, position_ids: Tensor, cache: Attends, rows: int) -> Tensor:
        """hidden [s, B, H] and positions [B, s] through the layers: [s, B, H], on the last stage after the final norm.

        `cache` computes attention, for the first `rows` rows of the batch; the others are fill (`attention.fill_rows`).
        A pack is a batch of one long row.
        """
        ...


class _SubLayer(NamedTuple):
    """Attention or MLP: the norm before it, and the one after it; every model has one of the two."""

    before: Tensor | None
    after: Tensor | None


class _Layer(NamedTuple):
    """One layer's live parameters; matrices are transposed views [in, out]."""

    number: int
    rotary: int
    scale: float
    window: int | None
    attention: _SubLayer
    qkv: Tensor
    qkv_bias: Tensor | None
    head_norms: Tensor | None  # [queries of a key head + 1, head_dim]: the query norm for each, then the key norm
    projection_norms: tuple[Tensor, Tensor] | None  # of all queries, of all keys of this rank
    projection: Tensor
    mlp: _SubLayer
    feed_forward: Callable[[Tensor], Tensor]  # the MLP or the experts: [T, H] -> [T, H], summed over the ranks


def head_logprobs(logits: Tensor, tokens: Tensor, temperature: float, columns: int) -> Tensor:
    """log p of `tokens` int64 [B] from logits float32 [B, V], computed as the trainer's head does, operation by
    operation: over parts of `columns` tokens, as tensor parallelism divides the vocabulary, which are then merged.
    Returns float32 [B]."""
    if temperature not in (0.0, 1.0):  # greedy counts as 1
        logits = logits * (1.0 / temperature)
    parts = []
    for start in range(0, logits.shape[1], columns):
        part = logits[:, start : start + columns].contiguous()
        local = tokens - start
        owned = (local >= 0) & (local < part.shape[1])
        target = Targets(local.clamp(0, part.shape[1] - 1), owned)
        parts.append(tile_kernels(part).softmax_statistics(part, target))
    return merged(torch.stack(parts)).logprob


class LocalStack:
    """The layers of one chunk of Megatron's local layers, and its embedding on the first pipeline stage.

    It refers to the live parameters but holds copies of per-head query and key norms and, under expert parallelism, of
    the other ranks' experts: construct it again when parameters have changed.

    config: Megatron's. group: the tensor-parallel group; None: the model is not sharded. experts: the expert-parallel
    group, over which constructing is collective then; None: all experts are here.
    """

    def __init__(
        self,
        chunk: Any,
        shape: ModelShape,
        config: Any,
        rotation: Rotation,
        group: dist.ProcessGroup | None,
        experts: dist.ProcessGroup | None,
    ) -> None:
        self._rotation, self._group, self._expert_group = rotation, group, experts
        self._activation, self._shape = config.activation_func, shape
        self._epsilon, self._dim = shape.norm_epsilon, shape.head_dim
        self._queries = shape.heads // shape.kv_heads  # query heads of one key head
        self._layers = [self._read(layer) for layer in chunk.decoder.layers]
        self._embedding = chunk.embedding.word_embeddings.weight if chunk.pre_process else None
        self._final_norm = chunk.decoder.final_layernorm.weight if chunk.post_process else None

    def _read(self, layer: Any) -> _Layer:
        attention, shape = layer.self_attention, self._shape
        kind = shape.attention[layer.layer_number - 1]
        head_norms, projection_norms = None, None
        if shape.qk_norm != "none":
            query, key = attention.q_layernorm.weight, attention.k_layernorm.weight
            if shape.qk_norm == "head":
                head_norms = torch.cat([query.expand(self._queries, -1), key[None]])
            else:
                projection_norms = (query, key)
        return _Layer(
            number=layer.layer_number,
            rotary=layer.rotary,
            scale=softmax_scale(shape, kind),
            window=kind.window,
            attention=self._norms(layer.input_layernorm, attention.linear_proj),
            qkv=attention.linear_qkv.weight.t(),
            qkv_bias=attention.linear_qkv.bias if shape.qkv_bias else None,
            head_norms=head_norms,
            projection_norms=projection_norms,
            projection=attention.linear_proj.weight.t(),
            mlp=self._norms(layer.pre_mlp_layernorm, None if shape.experts is not None else layer.mlp.linear_fc2),
            feed_forward=self._feed_forward(layer.mlp),
        )

    def _norms(self, before: Any, last: Any) -> _SubLayer:
        if self._shape.post_norm:
            return _SubLayer(None, last.post_norm.weight)
        return _SubLayer(before.weight, None)

    def _feed_forward(self, mlp: Any) -> Callable[[Tensor], Tensor]:
        if self._shape.experts is not None:  # every tensor-parallel rank has all tokens and all experts
            return ExpertMixture(mlp.router, gathered_experts(mlp.experts, self._expert_group), self._activation)
        gate_up, down = mlp.linear_fc1.weight.t(), mlp.linear_fc2.weight.t()

        def feed_forward(x: Tensor) -> Tensor:
            gate, up = torch.mm(x, gate_up).chunk(2, -1)
            return self._sum(torch.mm(self._activation(gate).mul_(up), down))

        return feed_forward

    def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        assert self._embedding is not None
        ids = input_ids.t()
        if self._group is None:
            return F.embedding(ids, self._embedding)
        rows = self._embedding.shape[0]
        ids = ids - self._group.rank() * rows
        outside = (ids < 0) | (ids >= rows)
        hidden = F.embedding(ids.masked_fill(outside, 0), self._embedding)
        return self._sum(hidden.masked_fill_(outside[..., None], 0.0))

    def run(self, hidden: Tensor, position_ids: Tensor, cache: Attends, rows: int) -> Tensor:
        steps, filled, _ = hidden.shape
        x = hidden.flatten(0, 1)
        rotations = self._rotations(position_ids, x.dtype)
        for layer in self._layers:
            parts = self._query_key_value(self._before(x, layer.attention), layer, rotations[layer.rotary])
            out = self._attend(layer, parts, steps, filled, cache, rows)
            x = self._after(self._sum(torch.mm(out, layer.projection)), layer.attention).add_(x)
            x = self._after(layer.feed_forward(self._before(x, layer.mlp)), layer.mlp).add_(x)
        if self._final_norm is not None:
            x = self._norm(x, self._final_norm)
        return x.view(steps, filled, -1)

    def _rotations(self, position_ids: Tensor, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """For each kind of rotary embedding cosines and signed sines, [tokens, 1, 1, head_dim] each."""
        positions, found = position_ids.t().reshape(-1, 1).float(), []
        for inverse in self._rotation.inverse_frequencies:
            half = positions * inverse
            cos, sin = half.cos(), half.sin()
            cos = torch.cat([cos, cos], -1)[:, None, None].to(dtype)
            found.append((cos, torch.cat([-sin, sin], -1)[:, None, None].to(dtype)))
        return found

    def _query_key_value(self, x: Tensor, layer: _Layer, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """query [tokens, key heads, its query heads, head_dim], key and value [tokens, key heads, head_dim]."""
        qkv = torch.mm(x, layer.qkv) if layer.qkv_bias is None else torch.addmm(layer.qkv_bias, x, layer.qkv)
        qkv = qkv.view(len(x), -1, self._queries + 2, self._dim)
        # [tokens, key heads, its query heads, then its key, then its value, head_dim]: RoPE turns all but the value
        rotated = qkv[:, :, :-1]
        if layer.head_norms is not None:
            rotated = self._norm(rotated, layer.head_norms)
        elif layer.projection_norms is not None:
            query, key = rotated[:, :, :-1].flatten(1, 2), rotated[:, :, -1]
            query, key = (
                projection_norm(part, weight, self._epsilon, self._group).view(len(x), key.shape[1], -1, self._dim)
                for part, weight in zip((query, key), layer.projection_norms, strict=True)
            )
            rotated = torch.cat([query, key], 2)
        cos, sin = rotation
        rotated = (rotated * cos).add_(rotated.roll(self._dim // 2, -1).mul_(sin))
        return rotated[:, :, :-1], rotated[:, :, -1], qkv[:, :, -1]

    def _attend(
        self, layer: _Layer, parts: tuple[Tensor, ...], steps: int, filled: int, cache: Attends, rows: int
    ) -> Tensor:
        query, key, value = (part.view(steps, filled, *part.shape[1:])[:, :rows] for part in parts)
        out = cache.attend(layer.number, query, key, value, layer.scale, layer.window)
        return fill_rows(out, filled, dim=1).view(steps * filled, -1)

    def _before(self, x: Tensor, norms: _SubLayer) -> Tensor:
        return x if norms.before is None else self._norm(x, norms.before)

    def _after(self, x: Tensor, norms: _SubLayer) -> Tensor:
        return x if norms.after is None else self._norm(x, norms.after)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """The numbers of `models.norm.RMSNorm`, over the last dimension."""
        if x.dtype is torch.float32:
            return F.rms_norm(x, x.shape[-1:], None, self._epsilon).mul_(weight)
        wide = x.float()
        wide = wide * wide.square().mean(-1, keepdim=True).add_(self._epsilon).rsqrt_()
        return wide.to(x.dtype).mul_(weight)

    def _sum(self, partial: Tensor) -> Tensor:
        """Sum over the tensor-parallel ranks, in place."""
        if self._group is not None:
            dist.all_reduce(partial, group=self._group)
        return partial

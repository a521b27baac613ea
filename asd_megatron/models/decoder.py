"""The inference forward, for sampling and scoring: without gradients and without Megatron's modules, over the live
parameters of a chunk.

It repeats the training forward operation by operation, so that a token's hidden state is the same number when it is
sampled, scored and trained.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from asd_megatron.models.attention import Attends, fill_rows
from asd_megatron.models.family import ModelShape
from asd_megatron.models.gpt import softmax_scale


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


class _Layer(NamedTuple):
    """One layer's live parameters; matrices are transposed views [in, out]."""

    number: int
    attention_norm: Tensor
    qkv: Tensor
    head_norms: Tensor | None  # [queries of a key head + 1, head_dim]: the query norm for each, then the key norm
    projection: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor


class LocalStack:
    """The layers of one chunk of Megatron's local layers, and its embedding on the first pipeline stage.

    It refers to the live parameters but holds copies of the query and key norms: construct it again when parameters
    have changed. config: Megatron's. group: the tensor-parallel group; None: the model is not sharded.
    """

    def __init__(
        self,
        chunk: Any,
        shape: ModelShape,
        config: Any,
        inverse_frequencies: Tensor,
        group: dist.ProcessGroup | None,
    ) -> None:
        self._inverse_frequencies, self._group = inverse_frequencies, group
        self._activation, self._scale = config.activation_func, softmax_scale(config)
        self._epsilon, self._dim = shape.norm_epsilon, shape.head_dim
        self._queries, self._head_norms = (
            shape.heads // shape.kv_heads,
            shape.qk_norm == "head",
        )  # query heads of one key head
        self._layers = [self._read(layer) for layer in chunk.decoder.layers]
        self._embedding = chunk.embedding.word_embeddings.weight if chunk.pre_process else None
        self._final_norm = chunk.decoder.final_layernorm.weight if chunk.post_process else None

    def _read(self, layer: Any) -> _Layer:
        attention, mlp, norms = layer.self_attention, layer.mlp, None
        if self._head_norms:
            query, key = attention.q_layernorm.weight, attention.k_layernorm.weight
            norms = torch.cat([query.expand(self._queries, -1), key[None]])
        return _Layer(
            layer.layer_number,
            layer.input_layernorm.weight,
            attention.linear_qkv.weight.t(),
            norms,
            attention.linear_proj.weight.t(),
            layer.pre_mlp_layernorm.weight,
            mlp.linear_fc1.weight.t(),
            mlp.linear_fc2.weight.t(),
        )

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
        half = position_ids.t().reshape(-1, 1).float() * self._inverse_frequencies
        cos, sin = half.cos(), half.sin()
        cos = torch.cat([cos, cos], -1)[:, None, None].to(x.dtype)
        sin = torch.cat([-sin, sin], -1)[:, None, None].to(x.dtype)
        for layer in self._layers:
            qkv = torch.mm(self._norm(x, layer.attention_norm), layer.qkv)
            qkv = qkv.view(len(x), -1, self._queries + 2, self._dim)
            # [tokens, key heads, its query heads, then its key, then its value, head_dim]: RoPE turns all but the value
            rotated = qkv[:, :, :-1]
            if layer.head_norms is not None:
                rotated = self._norm(rotated, layer.head_norms)
            rotated = (rotated * cos).add_(rotated.roll(self._dim // 2, -1).mul_(sin))
            parts = (rotated[:, :, :-1], rotated[:, :, -1], qkv[:, :, -1])
            out = self._attend(layer.number, parts, steps, filled, cache, rows)
            x = self._sum(torch.mm(out, layer.projection)).add_(x)
            gate, up = torch.mm(self._norm(x, layer.mlp_norm), layer.gate_up).chunk(2, -1)
            x = self._sum(torch.mm(self._activation(gate).mul_(up), layer.down)).add_(x)
        if self._final_norm is not None:
            x = self._norm(x, self._final_norm)
        return x.view(steps, filled, -1)

    def _attend(
        self, number: int, parts: tuple[Tensor, ...], steps: int, filled: int, cache: Attends, rows: int
    ) -> Tensor:
        query, key, value = (part.view(steps, filled, *part.shape[1:])[:, :rows] for part in parts)
        out = cache.attend(number, query, key, value, self._scale)
        return fill_rows(out, filled, dim=1).view(steps * filled, -1)

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

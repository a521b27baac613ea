"""Weight rules: which Hugging Face tensors a Megatron parameter corresponds to, and how it is sharded over
tensor-parallel ranks.

A rule is declarative; its operation converts in both directions between full Hugging Face tensors and one rank's shard.
Nothing here communicates: `models.export` gathers the shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shapes:
    """The model's sizes that operations need. `padded_vocab` is a multiple of the tensor-parallel size."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    padded_vocab: int


class Operation(Protocol):
    """Converts between full tensors, in the order of the rule's names, and the shard of rank `rank` of `size`."""

    def shapes(self, s: Shapes) -> tuple[tuple[int, ...], ...]:
        """The full tensors' shapes."""
        ...

    def shard(self, full: Sequence[Tensor], rank: int, size: int, s: Shapes) -> Tensor: ...

    def unshard(self, shards: Sequence[Tensor], s: Shapes) -> tuple[Tensor, ...]:
        """The full tensors; they may be views of `shards`."""
        ...


@dataclass(frozen=True)
class Copy:
    """Replicated: the same tensor on every rank. `dims` name its sizes in `Shapes`."""

    dims: tuple[str, ...]

    def shapes(self, s: Shapes) -> tuple[tuple[int, ...], ...]:
        return (tuple(getattr(s, d) for d in self.dims),)

    def shard(self, full: Sequence[Tensor], rank: int, size: int, s: Shapes) -> Tensor:
        return full[0]

    def unshard(self, shards: Sequence[Tensor], s: Shapes) -> tuple[Tensor, ...]:
        return (shards[0],)


@dataclass(frozen=True)
class Vocabulary:
    """[vocab, hidden], padded with zero rows to [padded_vocab, hidden], sharded along rows; never exported with
    padding."""

    def shapes(self, s: Shapes) -> tuple[tuple[int, ...], ...]:
        return ((s.vocab, s.hidden),)

    def shard(self, full: Sequence[Tensor], rank: int, size: int, s: Shapes) -> Tensor:
        rows = s.padded_vocab // size
        mine = full[0][rank * rows : (rank + 1) * rows]
        if len(mine) == rows:
            return mine
        return torch.cat([mine, mine.new_zeros(rows - len(mine), s.hidden)])

    def unshard(self, shards: Sequence[Tensor], s: Shapes) -> tuple[Tensor, ...]:
        return (torch.cat(list(shards))[: s.vocab],)


@dataclass(frozen=True)
class QKV:
    """q, k and v projections in Megatron's interleaved order: for each key/value head its query heads, then its key,
    then its value. With 4 query and 2 key/value heads: q0 q1 k0 v0 | q2 q3 k1 v1, of which rank 0 of 2 holds the first
    half.
    """

    def shapes(self, s: Shapes) -> tuple[tuple[int, ...], ...]:
        return (
            (s.heads * s.head_dim, s.hidden),
            (s.kv_heads * s.head_dim, s.hidden),
            (s.kv_heads * s.head_dim, s.hidden),
        )

    def shard(self, full: Sequence[Tensor], rank: int, size: int, s: Shapes) -> Tensor:
        per_head = [t.reshape(s.kv_heads, -1, s.head_dim, s.hidden) for t in full]
        interleaved = torch.cat(per_head, 1)
        heads = s.kv_heads // size
        return interleaved[rank * heads : (rank + 1) * heads].reshape(-1, s.hidden)

    def unshard(self, shards: Sequence[Tensor], s: Shapes) -> tuple[Tensor, ...]:
        per_key = s.heads // s.kv_heads
        full = torch.cat(list(shards)).reshape(s.kv_heads, per_key + 2, s.head_dim, s.hidden)
        parts = full.split([per_key, 1, 1], 1)
        return tuple(p.reshape(-1, s.hidden) for p in parts)


@dataclass(frozen=True)
class GateUp:
    """Gate and up projections, each sharded along rows: a rank holds its gate rows, then its up rows."""

    def shapes(self, s: Shapes) -> tuple[tuple[int, ...], ...]:
        return ((s.ffn, s.hidden), (s.ffn, s.hidden))

    def shard(self, full: Sequence[Tensor], rank: int, size: int, s: Shapes) -> Tensor:
        return torch.cat([t.chunk(size)[rank] for t in full])

    def unshard(self, shards: Sequence[Tensor], s: Shapes) -> tuple[Tensor, ...]:
        halves = [shard.chunk(2) for shard in shards]
        return (torch.cat([h[0] for h in halves]), torch.cat([h[1] for h in halves]))


@dataclass(frozen=True)
class Row:
    """[out, in] sharded along its input (Megatron's row-parallel linear): the projection back to the hidden size.
    `source` names the input's size."""

    source: str  # "attention" or "ffn"

    def shapes(self, s: Shapes) -> tuple[tuple[int, ...], ...]:
        return ((s.hidden, s.heads * s.head_dim if self.source == "attention" else s.ffn),)

    def shard(self, full: Sequence[Tensor], rank: int, size: int, s: Shapes) -> Tensor:
        return full[0].chunk(size, 1)[rank]

    def unshard(self, shards: Sequence[Tensor], s: Shapes) -> tuple[Tensor, ...]:
        return (torch.cat(list(shards), 1),)


@dataclass(frozen=True)
class Rule:
    """One Megatron parameter of a family, for every layer that has it.

    `megatron`: its names (local layers and Transformer Engine name norms differently). `huggingface`: the tensors that
    it holds. `{layer}` stands for the global layer number in all names.
    """

    megatron: tuple[str, ...]
    huggingface: tuple[str, ...]
    operation: Operation

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.huggingface[0]

    def names(self, layer: int | None) -> tuple[str, ...]:
        return self.huggingface if layer is None else tuple(n.replace("{layer}", str(layer)) for n in self.huggingface)

"""How one Megatron parameter corresponds to Hugging Face tensors, and how it is cut over tensor-parallel ranks.

A rule is declarative; an operation converts in both directions between full Hugging Face tensors and one rank's shard.
Nothing here communicates: the port gathers shards and hands them over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shapes:
    """The sizes that operations need. `padded_vocab` is a multiple of the tensor-parallel size."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    padded_vocab: int


class Operation(Protocol):
    """Between full tensors (in the order of the rule's names) and rank `rank`'s shard of `size`."""

    def shapes(self, s: Shapes) -> tuple[tuple[int, ...], ...]:
        """The full tensors' shapes."""
        ...

    def shard(self, full: Sequence[Tensor], rank: int, size: int, s: Shapes) -> Tensor: ...

    def unshard(self, shards: Sequence[Tensor], s: Shapes) -> tuple[Tensor, ...]:
        """New tensors; they may be views of `shards`, never of a live parameter unless a shard is."""
        ...


@dataclass(frozen=True)
class Copy:
    """The same tensor on every rank. `dims` name its sizes in `Shapes`."""

    dims: tuple[str, ...]

    def shapes(self, s: Shapes) -> tuple[tuple[int, ...], ...]:
        return (tuple(getattr(s, d) for d in self.dims),)

    def shard(self, full: Sequence[Tensor], rank: int, size: int, s: Shapes) -> Tensor:
        return full[0]

    def unshard(self, shards: Sequence[Tensor], s: Shapes) -> tuple[Tensor, ...]:
        return (shards[0],)


@dataclass(frozen=True)
class Vocabulary:
    """[vocab, hidden], padded with zero rows to [padded_vocab, hidden], cut along rows; padding never leaves."""

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
    """q, k and v projections, interleaved: for each key/value head its query heads, its key head, its value head."""

    def shapes(self, s: Shapes) -> tuple[tuple[int, ...], ...]:
        return (
            (s.heads * s.head_dim, s.hidden),
            (s.kv_heads * s.head_dim, s.hidden),
            (s.kv_heads * s.head_dim, s.hidden),
        )

    def shard(self, full: Sequence[Tensor], rank: int, size: int, s: Shapes) -> Tensor:
        per_head = [t.reshape(s.kv_heads, -1, s.head_dim, s.hidden) for t in full]
        interleaved = torch.cat(per_head, 1)
        groups = s.kv_heads // size
        return interleaved[rank * groups : (rank + 1) * groups].reshape(-1, s.hidden)

    def unshard(self, shards: Sequence[Tensor], s: Shapes) -> tuple[Tensor, ...]:
        per_group = s.heads // s.kv_heads
        whole = torch.cat(list(shards)).reshape(s.kv_heads, per_group + 2, s.head_dim, s.hidden)
        parts = whole.split([per_group, 1, 1], 1)
        return tuple(p.reshape(-1, s.hidden) for p in parts)


@dataclass(frozen=True)
class GateUp:
    """Gate and up projections: each cut along rows, each rank holding its gate rows before its up rows."""

    def shapes(self, s: Shapes) -> tuple[tuple[int, ...], ...]:
        return ((s.ffn, s.hidden), (s.ffn, s.hidden))

    def shard(self, full: Sequence[Tensor], rank: int, size: int, s: Shapes) -> Tensor:
        return torch.cat([t.chunk(size)[rank] for t in full])

    def unshard(self, shards: Sequence[Tensor], s: Shapes) -> tuple[Tensor, ...]:
        halves = [shard.chunk(2) for shard in shards]
        return (torch.cat([h[0] for h in halves]), torch.cat([h[1] for h in halves]))


@dataclass(frozen=True)
class Row:
    """[out, in] cut along its input: the projection back to the hidden size. `source` names the input's size."""

    source: str  # "attention" or "ffn"

    def shapes(self, s: Shapes) -> tuple[tuple[int, ...], ...]:
        return ((s.hidden, s.heads * s.head_dim if self.source == "attention" else s.ffn),)

    def shard(self, full: Sequence[Tensor], rank: int, size: int, s: Shapes) -> Tensor:
        return full[0].chunk(size, 1)[rank]

    def unshard(self, shards: Sequence[Tensor], s: Shapes) -> tuple[Tensor, ...]:
        return (torch.cat(list(shards), 1),)


@dataclass(frozen=True)
class Rule:
    """`megatron`: parameter names that the rule covers (local layers and Transformer Engine name norms differently).

    `{layer}` stands for the global layer number in all names.
    """

    megatron: tuple[str, ...]
    huggingface: tuple[str, ...]
    operation: Operation

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.huggingface[0]

    def names(self, layer: int | None) -> tuple[str, ...]:
        return self.huggingface if layer is None else tuple(n.replace("{layer}", str(layer)) for n in self.huggingface)

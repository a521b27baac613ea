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
    """The model's sizes that operations need. `padded_vocab` is a multiple of the tensor-parallel size; `experts` and
    `expert_ffn` are 0 in a model without experts."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    padded_vocab: int
    experts: int = 0
    expert_ffn: int = 0

    @property
    def queries(self) -> int:
        """Rows of the query projection."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Rows of the key projection, and of the value projection."""
        return self.kv_heads * self.head_dim

    def of(self, dims: Sequence[str]) -> tuple[int, ...]:
        """The sizes of these names."""
        return tuple(getattr(self, dim) for dim in dims)


class Sliceable(Protocol):
    """A full tensor, in memory or in a file, of which slices along one dimension are taken."""

    def __getitem__(self, index: slice | tuple[slice, ...]) -> Tensor: ...


class Operation(Protocol):
    """Converts between full tensors, in the order of the rule's names, and the shard of rank `rank` of `size`."""

    def shapes(self, s: Shapes) -> tuple[tuple[int, ...], ...]:
        """The full tensors' shapes."""
        ...

    def shard(self, full: Sequence[Sliceable], rank: int, size: int, s: Shapes) -> Tensor:
        """This rank's shard, from slices of the full tensors that hold nothing else."""
        ...

    def unshard(self, shards: Sequence[Tensor], s: Shapes) -> tuple[Tensor, ...]:
        """The full tensors; they may be views of `shards`."""
        ...


def _joined(shards: Sequence[Tensor], dim: int = 0) -> Tensor:
    """The shards as one tensor; a single one as it is, since a copy would be made in vain."""
    return shards[0] if len(shards) == 1 else torch.cat(list(shards), dim)


def _part(length: int, rank: int, size: int) -> slice:
    """Part `rank` of `size` equal ones."""
    return slice(rank * length // size, (rank + 1) * length // size)


@dataclass(frozen=True)
class Copy:
    """Replicated: the same tensor on every rank. `dims` name its sizes in `Shapes`."""

    dims: tuple[str, ...]

    def shapes(self, s: Shapes) -> tuple[tuple[int, ...], ...]:
        return (s.of(self.dims),)

    def shard(self, full: Sequence[Sliceable], rank: int, size: int, s: Shapes) -> Tensor:
        return full[0][:]

    def unshard(self, shards: Sequence[Tensor], s: Shapes) -> tuple[Tensor, ...]:
        return (shards[0],)


@dataclass(frozen=True)
class Split:
    """Sharded along its first dimension, in the tensor's own order. `dims` name its sizes in `Shapes`."""

    dims: tuple[str, ...]

    def shapes(self, s: Shapes) -> tuple[tuple[int, ...], ...]:
        return (s.of(self.dims),)

    def shard(self, full: Sequence[Sliceable], rank: int, size: int, s: Shapes) -> Tensor:
        return full[0][_part(s.of(self.dims)[0], rank, size)]

    def unshard(self, shards: Sequence[Tensor], s: Shapes) -> tuple[Tensor, ...]:
        return (_joined(shards),)


@dataclass(frozen=True)
class Vocabulary:
    """[vocab, hidden], padded with zero rows to [padded_vocab, hidden], sharded along rows; never exported with
    padding."""

    def shapes(self, s: Shapes) -> tuple[tuple[int, ...], ...]:
        return ((s.vocab, s.hidden),)

    def shard(self, full: Sequence[Sliceable], rank: int, size: int, s: Shapes) -> Tensor:
        rows = s.padded_vocab // size
        mine = full[0][min(rank * rows, s.vocab) : min((rank + 1) * rows, s.vocab)]
        if len(mine) == rows:
            return mine
        return torch.cat([mine, mine.new_zeros(rows - len(mine), s.hidden)])

    def unshard(self, shards: Sequence[Tensor], s: Shapes) -> tuple[Tensor, ...]:
        return (_joined(shards)[: s.vocab],)


@dataclass(frozen=True)
class QKV:
    """q, k and v projections, or their biases, in Megatron's interleaved order: for each key/value head its query
    heads, then its key, then its value. With 4 query and 2 key/value heads: q0 q1 k0 v0 | q2 q3 k1 v1, of which rank 0
    of 2 holds the first half.
    """

    bias: bool = False

    def shapes(self, s: Shapes) -> tuple[tuple[int, ...], ...]:
        return tuple((rows,) if self.bias else (rows, s.hidden) for rows in (s.queries, s.keys, s.keys))

    def shard(self, full: Sequence[Sliceable], rank: int, size: int, s: Shapes) -> Tensor:
        heads, rest = s.kv_heads // size, self._rest(s)
        parts = [
            t[_part(shape[0], rank, size)].reshape(heads, -1, s.head_dim, *rest)
            for t, shape in zip(full, self.shapes(s), strict=True)
        ]
        return torch.cat(parts, 1).reshape(-1, *rest)

    def unshard(self, shards: Sequence[Tensor], s: Shapes) -> tuple[Tensor, ...]:
        per_key, rest = s.heads // s.kv_heads, self._rest(s)
        full = _joined(shards).reshape(s.kv_heads, per_key + 2, s.head_dim, *rest)
        parts = full.split([per_key, 1, 1], 1)
        return tuple(p.reshape(-1, *rest) for p in parts)

    def _rest(self, s: Shapes) -> tuple[int, ...]:
        return () if self.bias else (s.hidden,)


@dataclass(frozen=True)
class GateUp:
    """Gate and up projections, each sharded along rows: a rank holds its gate rows, then its up rows. `rows` names
    their number in `Shapes`."""

    rows: str = "ffn"

    def shapes(self, s: Shapes) -> tuple[tuple[int, ...], ...]:
        return (s.of((self.rows, "hidden")),) * 2

    def shard(self, full: Sequence[Sliceable], rank: int, size: int, s: Shapes) -> Tensor:
        return torch.cat([t[_part(getattr(s, self.rows), rank, size)] for t in full])

    def unshard(self, shards: Sequence[Tensor], s: Shapes) -> tuple[Tensor, ...]:
        halves = [shard.chunk(2) for shard in shards]
        return (_joined([h[0] for h in halves]), _joined([h[1] for h in halves]))


@dataclass(frozen=True)
class Row:
    """[hidden, in] sharded along its input (Megatron's row-parallel linear): the projection back to the hidden size.
    `source` names the input's size in `Shapes`."""

    source: str

    def shapes(self, s: Shapes) -> tuple[tuple[int, ...], ...]:
        return (s.of(("hidden", self.source)),)

    def shard(self, full: Sequence[Sliceable], rank: int, size: int, s: Shapes) -> Tensor:
        return full[0][:, _part(getattr(s, self.source), rank, size)]

    def unshard(self, shards: Sequence[Tensor], s: Shapes) -> tuple[Tensor, ...]:
        return (_joined(shards, 1),)


@dataclass(frozen=True)
class Rule:
    """One Megatron parameter of a family, for every layer and expert that has it.

    `megatron`: its names (local layers and Transformer Engine name norms and experts differently). `huggingface`: the
    tensors that it holds. `{layer}` and `{expert}` stand for the global layer and expert number in all names. A
    parameter of an expert is on one rank, never sharded.
    """

    megatron: tuple[str, ...]
    huggingface: tuple[str, ...]
    operation: Operation

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.huggingface[0]

    @property
    def per_expert(self) -> bool:
        return "{expert}" in self.huggingface[0]

    def names(self, layer: int | None, expert: int | None = None) -> tuple[str, ...]:
        """The Hugging Face names of one layer's, one expert's tensors."""
        filled = {"{layer}": layer, "{expert}": expert}
        out = self.huggingface
        for place, number in filled.items():
            out = out if number is None else tuple(n.replace(place, str(number)) for n in out)
        return out

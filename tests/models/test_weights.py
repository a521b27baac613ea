"""Operations between whole tensors and shards: exact inverses at every tensor-parallel size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from asd_megatron.models.weights import QKV, Copy, GateUp, Row, Shapes, Split, Vocabulary

SIZES = Shapes(hidden=6, heads=8, kv_heads=4, head_dim=3, ffn=12, vocab=11, padded_vocab=12, experts=5, expert_ffn=8)
OPERATIONS = [
    Copy(("hidden",)),
    Copy(("head_dim",)),
    Copy(("experts", "hidden")),
    Split(("queries",)),
    Split(("keys",)),
    Vocabulary(),
    QKV(),
    QKV(bias=True),
    GateUp(),
    GateUp("expert_ffn"),
    Row("queries"),
    Row("ffn"),
    Row("expert_ffn"),
]


class Slices:
    """A tensor that knows how many elements of it were taken."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.taken = tensor, 0

    def __getitem__(self, index: slice | tuple[slice, ...]) -> Tensor:
        part = self.tensor[index]
        self.taken += part.numel()
        return part


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("operation", OPERATIONS, ids=repr)
def test_unshard_undoes_shard(operation: Any, size: int) -> None:
    full = [torch.randn(shape) for shape in operation.shapes(SIZES)]
    shards = [operation.shard(full, rank, size, SIZES) for rank in range(size)]
    assert len({s.shape for s in shards}) == 1
    back = operation.unshard(shards, SIZES)
    assert len(back) == len(full) and all(torch.equal(a, b) for a, b in zip(full, back, strict=True))


@pytest.mark.parametrize("operation", OPERATIONS, ids=repr)
def test_a_shard_takes_no_more_than_it_holds(operation: Any) -> None:
    for rank in range(4):
        full = [Slices(torch.randn(shape)) for shape in operation.shapes(SIZES)]
        shard = operation.shard(full, rank, 4, SIZES)
        padding = SIZES.hidden if isinstance(operation, Vocabulary) and rank == 3 else 0
        assert sum(f.taken for f in full) == shard.numel() - padding


def test_vocabulary_padding_is_zero_and_stays_home() -> None:
    whole = torch.ones(11, 6)
    last = Vocabulary().shard([whole], 3, 4, SIZES)
    assert last.shape == (3, 6) and last.sum() == 12 and (last[2] == 0).all()
    many = Shapes(hidden=6, heads=8, kv_heads=4, head_dim=3, ffn=12, vocab=5, padded_vocab=8)
    assert (Vocabulary().shard([whole[:5]], 3, 4, many) == 0).all()  # a rank of padding alone
    (back,) = Vocabulary().unshard([torch.full((3, 6), float(r)) for r in range(4)], SIZES)
    assert back.shape == (11, 6)


def test_each_shard_of_qkv_holds_whole_heads() -> None:
    """Megatron's order: for each key/value head its query heads, then its key, then its value."""
    q = torch.arange(8).repeat_interleave(3)[:, None] * torch.ones(6)
    k, v = (base + torch.arange(4).repeat_interleave(3)[:, None] * torch.ones(6) for base in (100, 200))
    shard = QKV().shard([q, k, v], 1, 2, SIZES)
    assert shard[::3, 0].tolist() == [4, 5, 102, 202, 6, 7, 103, 203]


def test_gate_rows_come_first() -> None:
    gate, up = torch.zeros(12, 6), torch.ones(12, 6)
    assert GateUp().shard([gate, up], 0, 4, SIZES)[:, 0].tolist() == [0, 0, 0, 1, 1, 1]


def test_biases_have_the_order_of_their_rows() -> None:
    full = [torch.randn(rows) for rows in (24, 12, 12)]
    wide = [bias[:, None] * torch.ones(6) for bias in full]
    for rank in range(2):
        assert torch.equal(QKV(bias=True).shard(full, rank, 2, SIZES), QKV().shard(wide, rank, 2, SIZES)[:, 0])

"""Attention over packs: each sequence sees itself alone, whatever calls it shares and whichever ranks hold it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from asd_megatron.models.attention import SDPACoreAttention, zigzag
from asd_megatron.models.attention_plan import MAX_CROSS_PAIRS, MAX_PADDING, SMALL_PADDING, plan_buckets
from tests.distributed.harness import run_ranks

PACKS = ([5], [1, 1, 1], [7, 2, 9, 2, 8, 1, 30], [64, 3, 3, 60, 4, 61], [16, 1], [200, 3, 3, 180, 4])
HEADS, KV_HEADS, DIM = 4, 2, 6
SCALE = DIM**-0.5


def _boundaries(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def _dense(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scale: float = SCALE, window: int | None = None
) -> Tensor:
    """Softmax over every earlier position of the same sequence, or the newest `window` ones, one sequence and one head
    at a time: [T, h * d]."""
    rows = []
    for q, k, v in zip(*(x.split(lengths) for x in (query, key, value)), strict=True):
        causal = torch.ones(len(q), len(q), dtype=torch.bool).tril().triu(1 - (window or len(q)))
        heads = []
        for head in range(HEADS):
            group = head // (HEADS // KV_HEADS)
            scores = (q[:, head] @ k[:, group].T * scale).masked_fill(~causal, -torch.inf)
            heads.append(scores.softmax(-1) @ v[:, group])
        rows.append(torch.stack(heads, 1).flatten(1))
    return torch.cat(rows)


def _inputs(tokens: int, seed: int = 0) -> list[Tensor]:
    """query [T, h, d], key and value [T, hkv, d] and the gradient of the output [T, h * d], float64."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((tokens, HEADS, DIM), (tokens, KV_HEADS, DIM), (tokens, KV_HEADS, DIM), (tokens, HEADS * DIM))
    return [torch.randn(s, generator=g, dtype=torch.float64) for s in shapes]


def _attention(
    context: int = 1, group: Any = None, scale: float = SCALE, window: int | None = None
) -> SDPACoreAttention:
    config = SimpleNamespace(context_parallel_size=context)
    groups = SimpleNamespace(cp=group)
    return SDPACoreAttention(config, 1, None, "self", pg_collection=groups, scale=scale, window=window)


def _differentiate(function: Any, qkv: list[Tensor], gradient: Tensor) -> list[Tensor]:
    """The output and the gradients of query, key and value."""
    inputs = [x.clone().requires_grad_() for x in qkv]
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, gradient)]


@pytest.mark.parametrize("lengths", PACKS, ids=str)
@pytest.mark.parametrize(("scale", "window"), [(SCALE, None), (0.3, None), (SCALE, 1), (SCALE, 5), (SCALE, 64)])
def test_packs_against_dense_attention(lengths: list[int], scale: float, window: int | None) -> None:
    *qkv, gradient = _inputs(sum(lengths))
    attention = _attention(scale=scale, window=window)
    packed = SimpleNamespace(boundaries=_boundaries(lengths).tolist(), parents=())
    found = _differentiate(lambda *x: attention(*x, packed_seq_params=packed).squeeze(1), qkv, gradient)
    expected = _differentiate(lambda q, k, v: _dense(q, k, v, lengths, scale, window), qkv, gradient)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    plan = packed.plan.buckets(window)
    attention(*qkv, packed_seq_params=packed)
    assert packed.plan.buckets(window) is plan  # the next layer uses it again


TREES = {
    "a group": ([20, 3, 9, 4], (-1, 0, 0, 0)),
    "equal segments": ([6, 5, 5], (-1, 0, 0)),
    "branches": ([16, 7, 2, 30, 1, 5], (-1, 0, 1, 1, 0, -1)),
    "two groups in turn": ([48, 32, 3, 2, 5, 4, 3, 1], (-1, -1, 0, 1, 0, 1, 0, 1)),
    "a large group": ([64, *[5] * 24, 40], (-1, *[0] * 24, 0)),
}


def _path(segment: int, parents: tuple[int, ...]) -> list[int]:
    return [*(_path(parents[segment], parents) if parents[segment] >= 0 else []), segment]


def _dense_tree(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], parents: tuple[int, ...], window: int | None
) -> Tensor:
    """Each segment as the end of its own complete sequence: [T, h * d]."""
    start = _boundaries(lengths).tolist()
    rows = []
    for i, length in enumerate(lengths):
        tokens = torch.cat([torch.arange(start[s], start[s + 1]) for s in _path(i, parents)])
        rows.append(_dense(q[tokens], k[tokens], v[tokens], [len(tokens)], window=window)[-length:])
    return torch.cat(rows)


@pytest.mark.parametrize("window", [None, 1, 4, 20])
@pytest.mark.parametrize("name", TREES)
def test_shared_prefixes_against_dense_attention(name: str, window: int | None) -> None:
    lengths, parents = TREES[name]
    *qkv, gradient = _inputs(sum(lengths))
    attention = _attention(window=window)
    packed = SimpleNamespace(boundaries=_boundaries(lengths).tolist(), parents=parents)
    found = _differentiate(lambda *x: attention(*x, packed_seq_params=packed).squeeze(1), qkv, gradient)
    expected = _differentiate(lambda q, k, v: _dense_tree(q, k, v, lengths, parents, window), qkv, gradient)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("lengths", PACKS, ids=str)
def test_buckets_hold_every_token_once_and_little_padding(lengths: list[int]) -> None:
    buckets = plan_buckets(_boundaries(lengths).tolist(), (), torch.device("cpu"))
    tokens = torch.cat([b.queries[b.valid] for b in buckets])
    assert tokens.sort().values.tolist() == list(range(sum(lengths)))
    for bucket in buckets:
        n, longest = bucket.valid.shape
        pairs = int(bucket.valid.sum(1).square().sum())
        assert n * longest**2 <= max(MAX_PADDING * pairs, pairs + SMALL_PADDING)
    assert len(buckets) <= len(set(lengths))  # equally long sequences always share a call


def test_siblings_share_the_keys_before_them() -> None:
    """24 short responses to a prompt of 64 tokens: some rows, not 24 copies of the prompt; and few cross-segment
    pairs."""
    lengths, parents = TREES["a large group"]
    buckets = plan_buckets(_boundaries(lengths).tolist(), parents, torch.device("cpu"))
    tokens = torch.cat([b.queries[b.valid] for b in buckets])
    assert tokens.sort().values.tolist() == list(range(sum(lengths)))
    rows = [int(v.sum()) for b in buckets for v, q in zip(b.valid, b.queries, strict=True) if q[0] > 0]
    assert len(rows) == 4 and sum(rows) == sum(lengths[1:])
    assert sum(n * (64 + n) for n in rows) <= MAX_CROSS_PAIRS * sum(n * (64 + n) for n in lengths[1:])


def test_the_example_of_the_buckets_docstring() -> None:
    (bucket,) = plan_buckets([0, 6, 8, 11], (-1, 0, 0), torch.device("cpu"))
    assert bucket.queries.tolist() == [[6, 7, 8, 9, 10, 0], [0, 1, 2, 3, 4, 5]]
    assert bucket.valid.tolist() == [[True] * 5 + [False], [True] * 6]
    assert bucket.keys.tolist() == [list(range(11)), [0, 1, 2, 3, 4, 5, 0, 0, 0, 0, 0]]
    own = ["1....", "11...", "..1..", "..11.", "..111"]
    mask = ["".join("1" if seen else "." for seen in row) for row in bucket.mask[0, 0].tolist()]
    assert mask[:5] == ["1" * 6 + row for row in own]


def test_other_calls_are_refused() -> None:
    *qkv, _ = _inputs(3)
    with pytest.raises(ValueError, match="packed sequences only"):
        _attention()(*qkv)


@pytest.mark.parametrize("size", [2, 3])
def test_zigzag_gives_every_position_to_one_rank(size: int) -> None:
    length = 4 * size
    held = [zigzag(length, size, rank) for rank in range(size)]
    assert torch.cat(held).sort().values.tolist() == list(range(length))
    # Work under a causal mask is the same on every rank.
    assert len({int((positions + 1).sum()) for positions in held}) == 1


def _shared(rank: int, lengths: list[int], window: int | None) -> list[list[Tensor]]:
    """This rank's share of the output and of the gradients, found and expected."""
    size = dist.get_world_size()
    start = _boundaries(lengths).tolist()
    mine = torch.cat([a + zigzag(n, size, rank) for a, n in zip(start, lengths, strict=False)])
    *qkv, gradient = _inputs(sum(lengths))
    attention = _attention(size, dist.group.WORLD, window=window)
    packed = SimpleNamespace(boundaries=_boundaries(lengths).tolist(), parents=())
    found = _differentiate(
        lambda *x: attention(*x, packed_seq_params=packed).squeeze(1), [x[mine] for x in qkv], gradient[mine]
    )
    expected = _differentiate(lambda q, k, v: _dense(q, k, v, lengths, window=window), qkv, gradient)
    return [found, [x[mine] for x in expected]]


@pytest.mark.parametrize("window", [None, 5])
def test_context_parallel_against_dense_attention(window: int | None) -> None:
    for found, expected in run_ranks(_shared, 2, [8, 4, 20, 4, 12], window):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)

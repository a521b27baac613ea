"""The exact divergence on 2 and 3 tensor-parallel ranks, against full logits in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from asd_megatron.ops.vocab_divergence import Divergence, VocabShard, linear_divergence_loss
from tests.distributed.harness import run_ranks
from tests.ops.dense import Head, error, grad
from tests.ops.dense_divergence import Pair

T, H = 24, 16  # T is a multiple of 2 and 3, for sequence parallelism
DIVERGENCES = (Divergence("jensen_shannon", 0.3), Divergence("reverse_kl"), Divergence("forward_kl"))


def _loss(logprobs: Tensor, entropy: Tensor, block: slice) -> Tensor:
    a, b = torch.randn(2, T, generator=torch.Generator().manual_seed(5)).to(logprobs.dtype)
    own = torch.exp(logprobs - logprobs.detach()) * (a[block] - 0.3 * logprobs.detach())
    return own.sum() + (entropy * b[block]).sum()


class _Gathers(TorchDispatchMode):
    """Counts collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += "c10d" in str(func)
        return func(*args, **(kwargs or {}))


def _body(rank: int, vocab: int, local_rows: int) -> dict[str, float]:
    group = dist.group.WORLD
    assert group is not None
    world = group.size()
    start = rank * local_rows
    own = slice(start, start + local_rows)
    worst: dict[str, float] = {}
    for divergence, some_rows, sequence_parallel, own_head in itertools.product(
        DIVERGENCES, (False, True), (False, True), (False, True)
    ):
        g = torch.Generator().manual_seed(vocab)
        hidden = torch.randn(T, H, generator=g)
        weight = torch.randn(local_rows * world, H, generator=g)
        weight[vocab:] = 1e4
        other = weight + 0.1 * torch.randn(weight.shape, generator=g) if own_head else weight
        index = torch.randperm(T, generator=g)[:13] if some_rows else None
        selected = hidden if index is None else hidden[index]
        n = len(selected)
        head = Head(hidden, weight[:vocab], torch.randint(0, vocab, (n,), generator=g), index, 0.7)
        teacher = selected + 0.5 * torch.randn(selected.shape, generator=g)
        pair = Pair(head, teacher, other[:vocab], torch.randn(n, generator=g))
        part = slice(rank * T // world, (rank + 1) * T // world) if sequence_parallel else slice(0, T)
        h, w = hidden[part].clone().requires_grad_(), weight[own].clone().requires_grad_()
        shard = VocabShard.of(vocab, local_rows, group, sequence_parallel)
        with _Gathers() as gathers:
            loss, columns = linear_divergence_loss(
                h,
                w,
                head.target,
                _loss,
                pair.coefficient,
                lambda b, teacher=teacher: teacher[b],
                divergence,
                shard,
                teacher_weight=other[own] if own_head else None,
                rows=index,
                temperature=0.7,
                token_block=7,
            )
        tiles = -(-n // 7)
        assert gathers.count <= 2 * tiles + 2, "two collectives a tile, one or two for the hidden states"
        loss.backward()
        want = pair.evaluate(_loss, divergence)
        got = {"loss": loss.detach(), **columns._asdict()}
        got |= {"d hidden": grad(h), "d weight": grad(w)[: shard.rows]}
        want["d hidden"], want["d weight"] = want["d hidden"][part], want["d weight"][start : start + shard.rows]
        for name, value in got.items():
            worst[name] = max(worst.get(name, 0.0), error(value, want[name]))
        worst["padding"] = max(worst.get("padding", 0.0), grad(w)[shard.rows :].abs().sum().item())
        mine = torch.cat([*columns, loss.detach()[None]])
        same = [torch.empty_like(mine) for _ in range(world)]
        dist.all_gather(same, mine, group=group)
        assert all(torch.equal(s, same[0]) for s in same), "ranks must agree to the last bit"
    return worst


@pytest.mark.parametrize(("world", "vocab", "local_rows"), [(2, 101, 64), (3, 50, 32)])  # 50: a rank with padding alone
def test_equals_dense_float64(world: int, vocab: int, local_rows: int) -> None:
    for worst in run_ranks(_body, world, vocab, local_rows):
        assert worst.pop("padding") == 0
        for name, value in worst.items():
            assert value < 5e-6, (name, value)

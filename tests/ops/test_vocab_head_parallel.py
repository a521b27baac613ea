"""The fused head on 2 and 3 tensor-parallel ranks, against full logits in float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from asd_megatron.ops.vocab_head import VocabShard, linear_logprob, linear_token_loss
from tests.distributed.harness import run_ranks
from tests.ops.dense import Head, error, grad

T, H = 24, 16  # T is a multiple of 2 and 3, for sequence parallelism


def _coefficients(n: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(5)
    return torch.randn(n, generator=g), torch.randn(n, generator=g)


def _loss(logprobs: Tensor, entropy: Tensor, block: slice) -> Tensor:
    a, b = (c.to(logprobs.dtype) for c in _coefficients(T))
    own = torch.exp(logprobs - logprobs.detach()) * (a[block] - 0.3 * logprobs.detach())
    return own.sum() + (entropy * b[block]).sum()


def _problem(vocab: int, padded: int, rows: str, temperature: float, dtype: torch.dtype) -> tuple[Head, Tensor]:
    g = torch.Generator().manual_seed(vocab)
    hidden = torch.randn(T, H, generator=g).to(dtype)
    weight = torch.randn(padded, H, generator=g).to(dtype)
    weight[vocab:] = 1e4
    index = {"none": None, "subset": torch.randperm(T, generator=g)[:13], "empty": torch.zeros(0, dtype=torch.int64)}[
        rows
    ]
    target = torch.randint(0, vocab, (T if index is None else len(index),), generator=g)
    return Head(hidden, weight[:vocab], target, index, temperature), weight


def _body(rank: int, vocab: int, local_rows: int) -> dict[str, float]:
    group = dist.group.WORLD
    assert group is not None
    world = group.size()
    worst: dict[str, float] = {}
    for rows, temperature, sequence_parallel, fused, dtype in itertools.product(
        ("none", "subset", "empty"), (1.0, 0.7), (False, True), (False, True), (torch.float32, torch.bfloat16)
    ):
        head, weight = _problem(vocab, local_rows * world, rows, temperature, dtype)
        shard = VocabShard.of(vocab, local_rows, group, sequence_parallel)
        part = slice(rank * T // world, (rank + 1) * T // world) if sequence_parallel else slice(0, T)
        h = head.hidden[part].clone().requires_grad_()
        w = weight[rank * local_rows : (rank + 1) * local_rows].clone().requires_grad_()
        options: dict[str, Any] = {"rows": head.rows, "temperature": temperature, "token_block": 7}
        if fused:
            loss, logprobs, entropy = linear_token_loss(h, w, head.target, _loss, shard, **options)
        else:
            logprobs, entropy = linear_logprob(h, w, head.target, shard, **options)
            loss = _loss(logprobs, entropy, slice(0, len(head.target)))
        loss.backward()
        want_loss, want_logprobs, want_entropy, want_h, want_w = head.evaluate(_loss)
        start = rank * local_rows
        exact = {
            "loss": error(loss, want_loss),
            "logprobs": error(logprobs, want_logprobs),
            "entropy": error(entropy, want_entropy),
        }
        gradients = {
            "d hidden": error(grad(h), want_h[part]),
            "d weight": error(grad(w)[: shard.rows], want_w[start : start + shard.rows]),
        }
        for name, value in {**exact, **gradients}.items():
            key = f"{name} {'bf16' if dtype is torch.bfloat16 and name in gradients else 'fp32'}"
            worst[key] = max(worst.get(key, 0.0), value)
        worst["padding"] = max(worst.get("padding", 0.0), grad(w)[shard.rows :].abs().sum().item())
        same = [torch.empty_like(logprobs.detach()) for _ in range(world)]
        if logprobs.numel():
            dist.all_gather(same, logprobs.detach(), group=group)
        assert all(torch.equal(s, same[0]) for s in same), "ranks must agree to the last bit"
        if rows == "empty":
            assert loss.item() == 0 and grad(h).shape == h.shape and not grad(h).any()
    return worst


@pytest.mark.parametrize(
    ("world", "vocab", "local_rows", "valid"),
    [
        (2, 101, 64, [64, 37]),
        (3, 101, 40, [40, 40, 21]),  # uneven
        (3, 50, 32, [32, 18, 0]),  # a rank with padding alone
    ],
)
def test_equals_dense_float64(world: int, vocab: int, local_rows: int, valid: list[int]) -> None:
    assert [max(0, min(local_rows, vocab - r * local_rows)) for r in range(world)] == valid
    for worst in run_ranks(_body, world, vocab, local_rows):
        assert worst.pop("padding") == 0
        for name, value in worst.items():
            assert value < (1.5e-2 if name.endswith("bf16") else 5e-6), (name, value)

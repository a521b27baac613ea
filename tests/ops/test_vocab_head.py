"""The fused head on one process, against full logits in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from asd_megatron.ops.vocab_head import TokenLoss, VocabShard, linear_logprob, linear_token_loss
from tests.ops.dense import Head, error, grad

T, H, V, PADDED = 37, 16, 101, 128


def problem(seed: int = 0, rows: str = "none", temperature: float = 1.0, scale: float = 1.0) -> tuple[Head, Tensor]:
    """A head problem and its padded weight, whose padding is garbage that would dominate every softmax."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(T, H, generator=g)
    weight = torch.randn(PADDED, H, generator=g) * scale
    weight[V:] = 1e4
    selected = {"none": None, "subset": torch.randperm(T, generator=g)[:23], "empty": torch.zeros(0, dtype=torch.int64)}
    index = selected[rows]
    count = T if index is None else len(index)
    target = torch.randint(0, V, (count,), generator=g)
    return Head(hidden, weight[:V], target, index, temperature), weight


def coefficients(n: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(99)
    return torch.randn(n, generator=g, dtype=torch.float64), torch.randn(n, generator=g, dtype=torch.float64)


def weighted(logprobs: Tensor, entropy: Tensor, block: slice) -> Tensor:
    a, b = (c.to(logprobs.dtype) for c in coefficients(T))
    return (logprobs * a[block]).sum() + (entropy * b[block]).sum()


def own_logprob(logprobs: Tensor, entropy: Tensor, block: slice) -> Tensor:
    """A loss whose weight depends on the token's own log-prob, differentiated and detached parts both."""
    a, _ = (c.to(logprobs.dtype) for c in coefficients(T))
    return -(torch.exp(logprobs - logprobs.detach()) * (a[block] - 0.5 * logprobs.detach())).sum()


def run(
    head: Head, weight: Tensor, loss: TokenLoss, fused: bool, block: int | None = 10, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    """(loss, logprobs, entropy, d hidden, d weight) of the product's op."""
    h = head.hidden.to(dtype).clone().requires_grad_()
    w = weight.to(dtype).clone().requires_grad_()
    shard = VocabShard.of(V, PADDED)
    options: dict[str, Any] = {"rows": head.rows, "temperature": head.temperature, "token_block": block}
    if fused:
        value, logprobs, entropy = linear_token_loss(h, w, head.target, loss, shard, **options)
    else:
        logprobs, entropy = linear_logprob(h, w, head.target, shard, **options)
        value = loss(logprobs, entropy, slice(0, len(head.target)))
    value.backward()
    return value.detach(), logprobs.detach(), entropy.detach(), grad(h), grad(w)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("rows", ["none", "subset", "empty"])
@pytest.mark.parametrize("loss", [weighted, own_logprob])
def test_equals_dense_float64(fused: bool, temperature: float, rows: str, loss: TokenLoss) -> None:
    head, weight = problem(rows=rows, temperature=temperature)
    got = run(head, weight, loss, fused)
    want = head.evaluate(loss)
    for name, g, w in zip(("loss", "logprobs", "entropy", "d hidden"), got, want, strict=False):
        assert error(g, w) < 3e-6, name
        assert g.dtype == torch.float32
    assert error(got[4][:V], want[4]) < 3e-6
    assert torch.equal(got[4][V:], torch.zeros(PADDED - V, H)), "padded rows have no gradient"


@pytest.mark.parametrize("fused", [False, True])
def test_float64_is_exact(fused: bool) -> None:
    head, weight = problem(temperature=0.7)
    got = run(head, weight, own_logprob, fused, dtype=torch.float64)
    want = head.evaluate(own_logprob)
    assert all(error(g, w) < 1e-13 for g, w in zip(got[:4], want, strict=False))


@pytest.mark.parametrize("fused", [False, True])
def test_block_size_changes_nothing(fused: bool) -> None:
    head, weight = problem(rows="subset")
    whole = run(head, weight, weighted, fused, block=1000)
    for block in (1, 7, 23, None):
        for g, w in zip(run(head, weight, weighted, fused, block=block), whole, strict=True):
            assert error(g, w) < 1e-6


@pytest.mark.parametrize("fused", [False, True])
def test_bfloat16_inputs_accumulate_in_float32(fused: bool) -> None:
    head, weight = problem(scale=0.5)
    head.hidden, weight = head.hidden.bfloat16(), weight.bfloat16()
    head.weight = weight[:V]
    got = run(head, weight, weighted, fused, dtype=torch.bfloat16)
    want = head.evaluate(weighted)
    assert all(error(g, w) < 3e-6 for g, w in zip(got[:3], want, strict=False))
    assert got[1].dtype == got[2].dtype == torch.float32
    assert got[3].dtype == got[4].dtype == torch.bfloat16
    assert error(got[3], want[3]) < 6e-3  # the logit gradient and the result are rounded to bfloat16
    assert error(got[4][:V], want[4]) < 4e-3


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("scale", [30.0, 1e30])
def test_extreme_logits(fused: bool, scale: float) -> None:
    """Probabilities of 1 up to rounding, and logits of -1e30: finite, entropy >= 0, gradients right."""
    head, weight = problem(scale=scale)
    head.target = (head.hidden.double() @ head.weight.double().t()).argmax(1)
    got = run(head, weight, weighted, fused)
    want = head.evaluate(weighted)
    assert all(torch.isfinite(t).all() for t in got)
    assert (got[2] >= 0).all()
    assert (got[1] <= 0).all() and got[1].max() > -1e-6
    if scale < 1e10:
        assert (got[1].double() - want[1]).abs().max() < 5e-5  # logits of size 300 in float32
        assert (got[2].double() - want[2]).abs().max() < 5e-4


def test_targets_that_are_all_but_impossible() -> None:
    head, weight = problem(scale=1e8)
    head.target = (head.hidden.double() @ head.weight.double().t()).argmin(1)
    got = run(head, weight, weighted, fused=True)
    assert error(got[1], head.evaluate(weighted)[1]) < 1e-6
    assert all(torch.isfinite(t).all() for t in got)


def test_a_target_outside_the_vocabulary_gives_minus_infinity() -> None:
    head, weight = problem()
    target = head.target.clone()
    target[3] = V  # a padded row
    logprobs, entropy = linear_logprob(head.hidden, weight, target, VocabShard.of(V, PADDED))
    assert logprobs[3] == -torch.inf
    assert torch.isfinite(entropy).all() and torch.isfinite(logprobs[:3]).all()


def test_no_tokens_still_runs_backward() -> None:
    for fused in (False, True):
        h = torch.randn(0, H, requires_grad=True)
        w = torch.randn(PADDED, H, requires_grad=True)
        none = torch.zeros(0, dtype=torch.int64)
        if fused:
            loss = linear_token_loss(h, w, none, weighted, VocabShard.of(V, PADDED))[0]
        else:
            loss = linear_logprob(h, w, none, VocabShard.of(V, PADDED))[0].sum()
        loss.backward()
        assert loss == 0 and grad(h).shape == (0, H) and not grad(w).any()


def test_upstream_gradient_scales_both_forms() -> None:
    head, weight = problem()
    for fused in (False, True):
        h, w = head.hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if fused:
            loss = linear_token_loss(h, w, head.target, weighted, VocabShard.of(V, PADDED))[0]
        else:
            loss = weighted(*linear_logprob(h, w, head.target, VocabShard.of(V, PADDED)), slice(0, T))
        (loss * -2.5).backward()
        want = head.evaluate(weighted)
        assert error(grad(h), -2.5 * want[3]) < 3e-6
        assert error(grad(w)[:V], -2.5 * want[4]) < 3e-6


def test_frozen_weight_or_hidden() -> None:
    head, weight = problem()
    want = head.evaluate(weighted)
    for fused in (False, True):
        for frozen in ("weight", "hidden"):
            h = head.hidden.clone().requires_grad_(frozen != "hidden")
            w = weight.clone().requires_grad_(frozen != "weight")
            if fused:
                linear_token_loss(h, w, head.target, weighted, VocabShard.of(V, PADDED))[0].backward()
            else:
                out = linear_logprob(h, w, head.target, VocabShard.of(V, PADDED))
                weighted(*out, slice(0, T)).backward()
            if frozen == "weight":
                assert w.grad is None and error(grad(h), want[3]) < 3e-6
            else:
                assert h.grad is None and error(grad(w)[:V], want[4]) < 3e-6


def test_a_constant_token_loss_has_no_gradient() -> None:
    head, weight = problem()
    h = head.hidden.clone().requires_grad_()
    loss = linear_token_loss(h, weight, head.target, lambda p, e, b: p.new_zeros(()), VocabShard.of(V, PADDED))[0]
    loss.backward()
    assert not grad(h).any()


class _Largest(TorchDispatchMode):
    """The largest tensor that any operation inside returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, Tensor):
                self.numel = max(self.numel, t.numel())
        return out


@pytest.mark.parametrize("fused", [False, True])
def test_no_tensor_exceeds_a_tile(fused: bool) -> None:
    """512 tokens, 2048 rows, tiles of 16 tokens: nothing near 512 x 2048 may exist."""
    tokens, vocab, width, block = 512, 2048, 8, 16
    h = torch.randn(tokens, width, requires_grad=True)
    w = torch.randn(vocab, width, requires_grad=True)
    target = torch.randint(0, vocab, (tokens,))
    shard = VocabShard.of(vocab, vocab)
    with _Largest() as largest:
        if fused:
            linear_token_loss(h, w, target, lambda p, e, b: p.sum() + e.sum(), shard, token_block=block)[0].backward()
        else:
            logprobs, entropy = linear_logprob(h, w, target, shard, token_block=block)
            (logprobs.sum() + entropy.sum()).backward()
    assert largest.numel == block * vocab


def test_prompt_rows_cost_no_products() -> None:
    h, w = torch.randn(1000, 8), torch.randn(64, 8)
    rows = torch.tensor([5, 900])
    with _Largest() as largest, torch.no_grad():
        linear_logprob(h, w, torch.tensor([1, 2]), VocabShard.of(64, 64), rows=rows)
    assert largest.numel <= w.numel()


def test_wrong_arguments_are_named() -> None:
    h, w, y = torch.randn(4, 8), torch.randn(16, 8), torch.zeros(4, dtype=torch.int64)
    shard = VocabShard.of(16, 16)
    with pytest.raises(ValueError, match="one dtype"):
        linear_logprob(h.bfloat16(), w, y, shard)
    with pytest.raises(ValueError, match="4 tokens are selected"):
        linear_logprob(h, w, y[:3], shard)
    with pytest.raises(ValueError, match="2 tokens are selected"):
        linear_logprob(h, w, y, shard, rows=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="temperature must be positive"):
        linear_logprob(h, w, y, shard, temperature=0.0)
    with pytest.raises(ValueError, match="token_block"):
        linear_logprob(h, w, y, shard, token_block=0)
    with pytest.raises(ValueError, match="valid rows"):
        linear_logprob(h, w, y, VocabShard(None, 0, 17))


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [False, True])
def test_bfloat16_on_cuda(fused: bool) -> None:
    head, weight = problem(scale=0.5)
    head.hidden, weight = head.hidden.bfloat16(), weight.bfloat16()
    head.weight = weight[:V]
    want = head.evaluate(weighted)
    head.hidden, head.target, weight = head.hidden.cuda(), head.target.cuda(), weight.cuda()

    def on_cuda(logprobs: Tensor, entropy: Tensor, block: slice) -> Tensor:
        a, b = (c.to(logprobs) for c in coefficients(T))
        return (logprobs * a[block]).sum() + (entropy * b[block]).sum()

    got = [t.cpu() for t in run(head, weight, on_cuda, fused, dtype=torch.bfloat16)]
    assert all(error(g, w) < 1e-5 for g, w in zip(got[:3], want, strict=False))
    assert error(got[3], want[3]) < 1e-2 and error(got[4][:V], want[4]) < 1e-2

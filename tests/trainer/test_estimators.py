"""The sampled term estimates the exact gradient: that is its expectation over the draw of the token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from asd_megatron.antisd import clipped_policy_loss, compose, condition, signal, term
from asd_megatron.ops.vocab_divergence import Divergence, VocabShard, linear_divergence_loss
from asd_megatron.ops.vocab_head import linear_logprob, linear_token_loss

LAMBDA, TEMPERATURE = 0.5, 0.7


@pytest.mark.parametrize(
    ("name", "divergence", "sign"),
    [
        ("antisd", Divergence(), -1),
        ("reverse_kl_ascent", Divergence("reverse_kl"), -1),
        ("sd", Divergence("reverse_kl"), 1),
    ],
)
def test_the_mean_over_all_tokens_is_the_exact_gradient(name: str, divergence: Divergence, sign: int) -> None:
    """Every token of the vocabulary once as the sampled one, weighted with its probability (Eq. 5). With a group
    advantage too, whose part has mean 0 over the draw."""
    g = torch.Generator().manual_seed(1)
    vocab, width, positions = 13, 6, 4
    weight = torch.randn(vocab, width, generator=g, dtype=torch.float64)
    student = torch.randn(positions, width, generator=g, dtype=torch.float64)
    teacher = student + torch.randn(positions, width, generator=g, dtype=torch.float64)
    shard = VocabShard.of(vocab, vocab)
    advantage = torch.tensor([1.2, -0.3, 0.0, 0.7], dtype=torch.float64)

    tokens = torch.arange(vocab).repeat(positions)
    place = torch.arange(positions).repeat_interleave(vocab)
    s, _ = linear_logprob(student[place], weight, tokens, shard, temperature=TEMPERATURE)
    t, _ = linear_logprob(teacher[place], weight, tokens, shard, temperature=TEMPERATURE)
    u = signal(condition(name), s, t)
    a = compose(condition(name), advantage[place], term(condition(name), u), LAMBDA)

    def sampled(logprobs: Tensor, entropy: Tensor, block: slice) -> Tensor:
        return clipped_policy_loss(logprobs, s[block], a[block], s[block].exp(), 0.2, 0.2)[0]

    def nothing(logprobs: Tensor, entropy: Tensor, block: slice) -> Tensor:
        return logprobs.new_zeros(())

    gradients = []
    for exact in (False, True):
        h, w = student.clone().requires_grad_(), weight.clone().requires_grad_()
        if exact:
            coefficient = torch.full((positions,), sign * LAMBDA, dtype=torch.float64)
            loss = linear_divergence_loss(
                h,
                w,
                torch.zeros(positions, dtype=torch.int64),
                nothing,
                coefficient,
                lambda b: teacher[b],
                divergence,
                shard,
                temperature=TEMPERATURE,
            )[0]
        else:
            loss = linear_token_loss(h, w, tokens, sampled, shard, rows=place, temperature=TEMPERATURE)[0]
        gradients.append(torch.autograd.grad(loss, (h, w)))
    for found, expected in zip(*gradients, strict=True):
        assert expected.abs().max() > 1e-3
        assert (found - expected).abs().max() < 1e-12

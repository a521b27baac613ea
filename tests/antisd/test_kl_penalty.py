"""The three estimators: their values, and what their gradients estimate. Means over the draw of a token are exact sums
over a small vocabulary, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from asd_megatron.antisd import KlPenalty, clipped_policy_loss, kl_estimates, kl_loss, penalised_advantage

VOCAB, COEFFICIENT = 17, 0.3


def distributions() -> tuple[Tensor, Tensor]:
    """Logits of p, with gradient, and log-probs of p_ref."""
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(VOCAB, generator=g, dtype=torch.float64)
    other = torch.log_softmax(logits + torch.randn(VOCAB, generator=g, dtype=torch.float64), 0)
    return logits.requires_grad_(), other


def kl(a: Tensor, b: Tensor) -> Tensor:
    return (a.exp() * (a - b)).sum()


def gradient(loss: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(loss, logits)[0]


def test_values() -> None:
    logits, reference = distributions()
    p = torch.log_softmax(logits.detach(), 0)
    means = [(p.exp() * k).sum() for k in kl_estimates(p, reference)]
    assert means[0] == pytest.approx(float(kl(p, reference)), rel=1e-12)
    assert means[2] == pytest.approx(float(kl(p, reference)), rel=1e-12)
    near = kl_estimates(p, p + 1e-3 * reference)
    assert (p.exp() * near.k2).sum() == pytest.approx(float((p.exp() * near.k3).sum()), rel=1e-2)
    assert kl_estimates(p, reference).k2.min() >= 0 and kl_estimates(p, reference).k3.min() >= 0
    assert all(not k.any() for k in kl_estimates(p, p))


def test_gradients() -> None:
    """Every token of the vocabulary once, weighted with its probability."""
    logits, reference = distributions()
    p = torch.log_softmax(logits, 0)
    weights = p.detach().exp()
    reverse, forward = gradient(kl(p, reference), logits), gradient(kl(reference, torch.log_softmax(logits, 0)), logits)
    p = torch.log_softmax(logits, 0)
    assert gradient((weights * (p - reference)).sum(), logits).abs().max() < 1e-12  # k1 as a loss does nothing

    p = torch.log_softmax(logits, 0)
    advantage = penalised_advantage(torch.zeros(VOCAB, dtype=torch.float64), p, reference, COEFFICIENT)
    assert not advantage.requires_grad
    found = {"k1": gradient(clipped_policy_loss(p, p, advantage, weights, 0.2, 0.2)[0], logits)}
    for estimator in ("k2", "k3"):
        p = torch.log_softmax(logits, 0)
        found[estimator] = gradient(kl_loss(p, reference, weights, KlPenalty(estimator, COEFFICIENT)), logits)
    for estimator, expected in (("k1", reverse), ("k2", reverse), ("k3", forward)):
        assert (found[estimator] - COEFFICIENT * expected).abs().max() < 1e-12, estimator
    assert (reverse - forward).abs().max() > 1e-2


def test_the_weights_are_those_of_the_policy_loss() -> None:
    logprobs = torch.tensor([-1.0, -2.0, float("nan"), -3.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-1.5, -1.0, float("inf"), -3.0], dtype=torch.float64)
    weights = torch.tensor([0.5, 0.25, 0.0, 0.25], dtype=torch.float64)
    importance = torch.tensor([2.0, 0.5, 1.0, 1.0], dtype=torch.float64)
    loss = kl_loss(logprobs, reference, weights, KlPenalty("k2", 2.0), importance)
    assert float(loss.detach()) == pytest.approx(2 * (0.5 * 2 * 0.125 + 0.25 * 0.5 * 0.5))
    assert gradient(loss, logprobs).tolist() == pytest.approx([2 * 0.5 * 2 * 0.5, -2 * 0.25 * 0.5, 0.0, 0.0])


def test_k1_is_no_loss() -> None:
    with pytest.raises(ValueError, match="belongs to the advantage"):
        kl_loss(torch.zeros(1), torch.zeros(1), torch.ones(1), KlPenalty("k1", 1.0))

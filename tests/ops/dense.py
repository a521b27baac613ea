"""The same quantities from full logits in float64: the reference for `asd_megatron.ops.vocab_head`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from asd_megatron.ops.vocab_head import TokenLoss


@dataclass
class Head:
    """A head problem: hidden [T, H], weight [V, H] (valid rows only), targets of the selected tokens, their rows."""

    hidden: Tensor
    weight: Tensor
    target: Tensor
    rows: Tensor | None
    temperature: float

    def evaluate(self, token_loss: TokenLoss) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(loss, logprobs, entropy, d hidden, d weight) in float64 for `token_loss(logprobs, entropy, block)`."""
        hidden = self.hidden.detach().double().requires_grad_()
        weight = self.weight.detach().double().requires_grad_()
        logprobs, entropy = dense_logprob(hidden, weight, self.target, self.rows, self.temperature)
        loss = token_loss(logprobs, entropy, slice(0, len(self.target)))
        (loss + 0 * hidden.sum() + 0 * weight.sum()).backward()
        return loss.detach(), logprobs.detach(), entropy.detach(), grad(hidden), grad(weight)


def dense_logprob(
    hidden: Tensor, weight: Tensor, target: Tensor, rows: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    selected = hidden if rows is None else hidden[rows]
    logp = torch.log_softmax(selected @ weight.t() / temperature, -1)
    return logp.gather(1, target[:, None])[:, 0], -(logp.exp() * logp).sum(1)


def error(got: Tensor, want: Tensor) -> float:
    """Largest absolute difference over the largest absolute value (absolute where that is 0)."""
    if want.numel() == 0:
        return 0.0
    scale = want.abs().max().double().item() or 1.0
    return (got.double() - want.double()).abs().max().item() / scale


def grad(t: Tensor) -> Tensor:
    """The tensor's gradient, which must exist."""
    assert t.grad is not None
    return t.grad

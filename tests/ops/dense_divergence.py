"""The same quantities from full logits in float64, by their definitions: the reference for `ops.vocab_divergence`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from asd_megatron.ops.head_tiles import TokenLoss
from asd_megatron.ops.vocab_divergence import Divergence
from tests.ops.dense import Head, grad


def kl(logp: Tensor, logq: Tensor) -> Tensor:
    """KL(p, q) of each row; tokens with p = 0 contribute nothing."""
    p = logp.exp()
    return torch.where(p > 0, p * (logp - logq), 0.0).sum(-1)


def dense_divergence(logp: Tensor, logq: Tensor, divergence: Divergence) -> Tensor:
    if divergence.kind == "reverse_kl":
        return kl(logp, logq)
    if divergence.kind == "forward_kl":
        return kl(logq, logp)
    b = divergence.mixture
    logm = torch.logaddexp(logq + math.log(b), logp + math.log(1 - b))
    return b * kl(logq, logm) + (1 - b) * kl(logp, logm)


@dataclass
class Pair:
    """A head problem with a teacher: its hidden states [N, H] and its weight [V, H] (valid rows only)."""

    student: Head
    teacher_hidden: Tensor
    teacher_weight: Tensor
    coefficient: Tensor  # [N]

    def evaluate(self, token_loss: TokenLoss, divergence: Divergence) -> dict[str, Tensor]:
        """Everything that the op returns, and both gradients, in float64 by autograd through the definitions."""
        head = self.student
        hidden, weight = (t.detach().double().requires_grad_() for t in (head.hidden, head.weight))
        selected = hidden if head.rows is None else hidden[head.rows]
        logp = torch.log_softmax(selected @ weight.t() / head.temperature, -1)
        teacher = self.teacher_hidden.double() @ self.teacher_weight.double().t() / head.temperature
        logq = torch.log_softmax(teacher, -1)
        logprobs = logp.gather(1, head.target[:, None])[:, 0]
        entropy = -(logp.exp() * logp).sum(1)
        value = dense_divergence(logp, logq, divergence)
        loss = token_loss(logprobs, entropy, slice(0, len(head.target))) + (self.coefficient.double() * value).sum()
        (loss + 0 * hidden.sum() + 0 * weight.sum()).backward()
        return {
            "loss": loss.detach(),
            "logprobs": logprobs.detach(),
            "entropy": entropy.detach(),
            "teacher_logprobs": logq.gather(1, head.target[:, None])[:, 0],
            "teacher_entropy": -(logq.exp() * logq).sum(1),
            "divergence": value.detach(),
            "reverse_kl": kl(logp, logq).detach(),
            "forward_kl": kl(logq, logp).detach(),
            "agreement": (logp.argmax(-1) == logq.argmax(-1)).double(),
            "d hidden": grad(hidden),
            "d weight": grad(weight),
        }

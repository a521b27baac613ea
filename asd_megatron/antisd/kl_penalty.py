"""A penalty on the divergence of the policy p from a fixed reference p_ref, estimated from the sampled tokens.

With r = log p(y) - log p_ref(y) of a token y drawn from p (under one prefix), three estimators of KL(p, p_ref):

    k1 = r                    unbiased, may be negative
    k2 = r^2 / 2              biased by terms of third order in r, never negative
    k3 = exp(-r) - 1 + r      unbiased, never negative: exp(-r) - 1 has mean 0 and is anti-correlated with r

An unbiased value does not make an unbiased gradient. As a loss on tokens that are already sampled, the mean gradients
over the draw of y are

    k1    E[grad log p]                    = 0: no penalty at all
    k2    E[r grad log p]                  = grad KL(p, p_ref)
    k3    E[(1 - p_ref / p) grad log p]    = grad KL(p_ref, p), the divergence in the other direction

k1 therefore acts as a reward of the token, A - coefficient * r with r a constant: its policy gradient is coefficient *
E[r grad log p], that of k2. The two differ beyond the first update of a batch (k1 is frozen and goes through the
clipped ratio, k2 follows the weights) and nowhere else. k2 and k3 are terms of the loss.

The mean is over the token under its prefix: what a token does to the divergence of later tokens is not counted. It is
exact when y comes from p: on-policy, in the first update of a batch, with importance weights where an engine's
distribution differs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Estimator = Literal["k1", "k2", "k3"]


@dataclass(frozen=True)
class KlPenalty:
    """Which estimator, and its weight beside the policy loss (above 0)."""

    estimator: Estimator
    coefficient: float

    @property
    def in_advantage(self) -> bool:
        """Whether the penalty is part of the advantage instead of the loss."""
        return self.estimator == "k1"


class KlEstimates(NamedTuple):
    """The estimators of KL(p, p_ref) of every token, [N] nats."""

    k1: Tensor
    k2: Tensor
    k3: Tensor


def kl_estimates(logprobs: Tensor, reference: Tensor) -> KlEstimates:
    """All three, from the log-probs [N] of the sampled tokens under the policy and under the reference."""
    r = logprobs - reference
    return KlEstimates(r, r.square() / 2, torch.expm1(-r) + r)


def penalised_advantage(advantage: Tensor, logprobs: Tensor, reference: Tensor, coefficient: float) -> Tensor:
    """A - coefficient * k1 of every token [N], a constant. `logprobs`: under the scoring weights."""
    return advantage - coefficient * (logprobs.detach() - reference.detach())


def kl_loss(
    logprobs: Tensor,
    reference: Tensor,
    weights: Tensor,
    penalty: KlPenalty,
    importance: Tensor | None = None,
) -> Tensor:
    """coefficient * sum_t w_t * i_t * k(r_t), k2 or k3 as `penalty` says; a scalar with a gradient in `logprobs`.

    Args (all [N]):
        logprobs: of the weights being updated. reference: constants.
        weights, importance: as in `clipped_policy_loss`. Tokens of weight 0 take no part whatever they hold.

    Raises ValueError for k1, whose gradient as a loss has mean 0.
    """
    if penalty.in_advantage:
        raise ValueError("the gradient of k1 as a loss has mean 0: it belongs to the advantage (penalised_advantage)")
    used = weights != 0
    # Only tokens that count reach the gradient path: a non-finite number in another would turn 0 * inf into NaN.
    estimates = kl_estimates(torch.where(used, logprobs, 0.0), torch.where(used, reference.detach(), 0.0))
    value = estimates.k2 if penalty.estimator == "k2" else estimates.k3
    scale = weights.detach() if importance is None else weights.detach() * importance.detach()
    return penalty.coefficient * torch.where(used, scale * value, 0.0).sum()

"""Group-relative advantages (GRPO) and their composition with the per-token term (Eq. 3 and 6)."""

from __future__ import annotations

import torch
from torch import Tensor

from asd_megatron.antisd.divergence import Condition, resolve_condition
from asd_megatron.errors import UserError

STD_EPSILON = 1e-6
RLSD_CLIP = 0.2
"""The weight of `rlsd` lies between 1 - this and 1 + this."""


class AdvantageError(UserError, ValueError):
    """Rewards that no group-relative advantage can be made of."""


def group_advantages(rewards: Tensor) -> Tensor:
    """A_seq of one group: (R - mean) / (std + 1e-6) with the sample standard deviation (divisor G - 1).

    Rewards [G] to float64 [G]. Equal rewards give exactly 0. Raises AdvantageError for fewer than two rollouts or a
    reward that is not finite.
    """
    r = rewards.detach().double()
    if r.numel() < 2:
        raise AdvantageError(
            f"a group of {r.numel()} rollout(s) has no group-relative advantage: "
            "set sampling.rollouts_per_problem to 2 or more"
        )
    if not torch.isfinite(r).all():
        raise AdvantageError(f"rewards must be finite numbers, got {r.tolist()}: check the reward function")
    if (r == r[0]).all():
        return torch.zeros_like(r)
    return (r - r.mean()) / (r.std(correction=1) + STD_EPSILON)


def compose(
    cond: Condition | str, group_advantage: Tensor, term: Tensor, lam: float | Tensor, weight: float = 1.0
) -> Tensor:
    """The advantage of every token [N] from A_seq [N], the finished term [N] and this step's lambda, one number or one
    for each token [N] (formulas: `Condition`).

    A constant of the policy gradient (detached). `weight`: of A_seq in the additive form, where it must be 1 in the
    others; a condition without a term (`grpo`) ignores it. Where the term or lambda is 0, the result is the weighted
    A_seq exactly. `multiplicative` and `rlsd` (with a lambda between -5 and 5) never change the sign of A_seq.
    """
    c = resolve_condition(cond)
    a, q = group_advantage.detach(), term.detach()
    if c.sign == 0:
        return a.clone()
    if weight != 1.0:
        a = weight * a
    strength = c.sign * lam
    if not isinstance(strength, Tensor) and strength == 0:
        return a.clone()
    if c.composition == "additive":
        composed = a + strength * q
    elif c.composition == "multiplicative":
        composed = a * (1 + strength * q * a.sign()).clamp(min=0)
    elif c.composition == "multiplicative_plain":
        composed = a * (1 + strength * q)
    else:  # rlsd: (1 - lambda) + lambda * w, in a form that is exactly 1 where w is
        w = (c.sign * a.sign() * q).exp().clamp(1 - RLSD_CLIP, 1 + RLSD_CLIP)
        composed = a * (1 + lam * (w - 1))
    return torch.where(strength != 0, composed, a) if isinstance(strength, Tensor) else composed

"""Group-relative advantages and their composition with the per-token term (Eq. 3 and 6)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from asd_megatron.antisd.divergence import Condition, resolve_condition
from asd_megatron.errors import UserError

STD_EPSILON = 1e-6
RLSD_CLIP = 0.2
"""The weight of `rlsd` lies between 1 - this and 1 + this."""


class AdvantageError(UserError, ValueError):
    """Rewards that no group-relative advantage can be made of."""


GroupAdvantage = Literal["normalized", "centered", "leave_one_out"]


def group_advantages(rewards: Tensor, kind: GroupAdvantage = "normalized") -> Tensor:
    """A_seq of one group of n responses.

    * `normalized`: (R_i - mean) / (std + 1e-6) with the sample standard deviation (divisor n - 1): GRPO
      (arXiv 2402.03300, section 4.1.2).
    * `centered`: R_i - mean: Dr. GRPO (arXiv 2503.20783, section 3.2), whose loss weighs a group no more for having
      nearly equal rewards.
    * `leave_one_out`: R_i - mean of the other n - 1 rewards: RLOO (arXiv 2402.14740), a baseline that does not
      depend on the response. It is n / (n - 1) times `centered`.

    Rewards [n] to float64 [n]. Equal rewards give exactly 0. Raises AdvantageError for fewer than two rollouts or a
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
    if kind == "leave_one_out":
        return r - (r.sum() - r) / (r.numel() - 1)
    centered = r - r.mean()
    return centered if kind == "centered" else centered / (r.std(correction=1) + STD_EPSILON)


def whitened(advantages: Tensor) -> Tensor:
    """Advantages [R] of a batch's responses, divided by their standard deviation (divisor R - 1) + 1e-6: float64 [R].

    The mean over the batch is 0 already, since every group's advantages add up to 0, so this is (A - mean) / std, the
    normalization over the batch of REINFORCE++ with a group baseline (arXiv 2501.03262); and what is exactly 0 stays
    so. Every response counts once, however long it is, and so does one that the loss does not see. Fewer than two
    responses are returned as they are.
    """
    a = advantages.detach().double()
    return a if a.numel() < 2 else a / (a.std(correction=1) + STD_EPSILON)


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

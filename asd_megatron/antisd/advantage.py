"""Group-relative advantages (GRPO) and their composition with the per-token term (Eq. 3 and 6)."""

from __future__ import annotations

import torch
from torch import Tensor

from asd_megatron.antisd.divergence import Condition, resolve_condition
from asd_megatron.errors import UserError

STD_EPSILON = 1e-6


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


def compose(cond: Condition | str, group_advantage: Tensor, term: Tensor, lam: float) -> Tensor:
    """The advantage of every token [N] from A_seq [N], the finished term [N] and this step's lambda (formulas:
    `Condition`).

    A constant of the policy gradient (detached). Where the term is 0, and everywhere when lambda is 0, it is A_seq
    exactly. The multiplicative form never changes the sign of A_seq.
    """
    c = resolve_condition(cond)
    a, q = group_advantage.detach(), term.detach()
    strength = c.sign * lam
    if strength == 0:
        return a.clone()
    if c.composition == "additive":
        return a + strength * q
    return a * (1 + strength * q * a.sign()).clamp(min=0)

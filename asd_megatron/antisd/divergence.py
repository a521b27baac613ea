"""The per-token quantity: PMI u (Eq. 4), the bounded shape phi (Eq. 6), and the conditions that use them.

Everything is element-wise over response tokens, in nats, without communication; any float dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from asd_megatron.errors import UserError

Composition = Literal["additive", "multiplicative", "multiplicative_plain", "rlsd"]


class UnknownCondition(UserError, ValueError):
    """The recipe names an algorithm that does not exist."""


@dataclass(frozen=True)
class Condition:
    """One experimental condition of the paper: how u becomes an advantage, and which entropy the gate reads.

    With q = u (`shape` "identity") or q = phi(u) ("phi"), lambda from the gate and A_seq the group-relative advantage:

    * additive:        A = A_seq + sign * lambda * q
    * multiplicative:  A = A_seq * max(0, 1 + sign * lambda * q * sgn(A_seq))
    * multiplicative_plain:  A = A_seq * (1 + sign * lambda * q)
    * rlsd:            A = A_seq * ((1 - lambda) + lambda * clip(exp(sign * q * sgn(A_seq)), 0.8, 1.2))

    So `sd` (+1, identity) is A_seq + lambda * u (Eq. 2, 3) and `antisd` (-1, phi) is A_seq - lambda * phi(u) (Eq. 6).
    The last two forms are the released code's: `algorithm.composition` gives them to a condition.

    Attributes:
        name: the recipe's `algorithm.name`.
        uses_teacher: the term or the gate needs the privileged scoring pass.
        sign: of the term in the advantage; 0 leaves A_seq alone (`grpo`).
        composition: how the term and A_seq are combined.
        shape: q as a function of u.
        gated: lambda follows the entropy gate; otherwise it is lambda_max (after a warm-up, if the recipe gives one).
        gate_entropy: whose full-vocabulary entropy the gate's H is the median of. Ungated conditions only log H.
        u_source: "teacher": u = t - s (Eq. 4). "student": u = -s, the ablation `no_teacher`.
    """

    name: str
    uses_teacher: bool = True
    sign: int = -1
    composition: Composition = "additive"
    shape: Literal["phi", "identity"] = "phi"
    gated: bool = True
    gate_entropy: Literal["teacher", "student"] | None = "teacher"
    u_source: Literal["teacher", "student"] = "teacher"


CONDITIONS: dict[str, Condition] = {
    c.name: c
    for c in (
        Condition("grpo", uses_teacher=False, sign=0, gated=False, gate_entropy=None),
        Condition("sd", sign=1, shape="identity", gated=False),
        Condition("antisd"),
        Condition("reverse_kl_ascent", shape="identity"),
        Condition("no_gate", gated=False),
        Condition("multiplicative", composition="multiplicative"),
        Condition("student_entropy_gate", gate_entropy="student"),
        Condition("no_teacher", uses_teacher=False, gate_entropy="student", u_source="student"),
    )
}


def condition(name: str) -> Condition:
    """The condition of that recipe name. Raises UnknownCondition, which lists the names that exist."""
    if name not in CONDITIONS:
        raise UnknownCondition(f"algorithm.name {name!r} does not exist; choose one of {', '.join(CONDITIONS)}")
    return CONDITIONS[name]


def pmi(teacher_logprobs: Tensor, student_logprobs: Tensor) -> Tensor:
    """u = t - s, the conditional PMI of a token and the privileged context (Eq. 4); detached, in nats."""
    return teacher_logprobs.detach() - student_logprobs.detach()


def phi(u: Tensor) -> Tensor:
    """phi(u) = (softplus(u) - log 2) / 2 (Eq. 6), to full relative precision; same shape and dtype.

    Strictly increasing, phi(0) = 0 exactly, the sign of u, phi'(u) = sigmoid(u) / 2, phi >= -(log 2) / 2, unbounded
    above (Lemma 5). Minus phi is the derivative of the Jensen-Shannon f at r = exp(-u) (Lemma 4).
    """
    # log((1 + e^u) / 2) without overflow or cancellation; the clamps keep the branch that is not taken finite.
    above = u + torch.log1p(torch.expm1(-u.clamp(min=0)) / 2)
    below = torch.log1p(torch.expm1(u.clamp(max=0)) / 2)
    return torch.where(u > 0, above, below) / 2


def identity(u: Tensor) -> Tensor:
    """u itself: the reverse-KL term of SD and of its ascent (Eq. 2, Lemma 1)."""
    return u


SHAPES = {"phi": phi, "identity": identity}


def signal(
    cond: Condition | str, student_logprobs: Tensor, teacher_logprobs: Tensor | None, has_context: Tensor | None = None
) -> Tensor:
    """u of every response token [N] under the condition, detached.

    Args:
        student_logprobs: s, under the scoring weights.
        teacher_logprobs: t, under the same weights; None only when the condition's `u_source` is "student".
        has_context: bool [N], the rollout has a privileged prompt. Where False, t means nothing and u is exactly 0
            (whatever t holds, NaN included). None: all have one. Ignored for `u_source` "student".
    """
    c = resolve_condition(cond)
    if c.u_source == "student":
        return -student_logprobs.detach()
    if teacher_logprobs is None:
        raise ValueError(f"condition {c.name!r} takes u from the teacher: pass teacher_logprobs")
    u = pmi(teacher_logprobs, student_logprobs)
    return u if has_context is None else torch.where(has_context, u, torch.zeros_like(u))


def term(cond: Condition | str, u: Tensor, *, pmi_clip: float | None = None) -> Tensor:
    """The per-token quantity q that lambda multiplies: phi(u) or u, after clamping u to +-pmi_clip; detached."""
    u = u.detach()
    if pmi_clip is not None:
        u = u.clamp(-pmi_clip, pmi_clip)
    return SHAPES[resolve_condition(cond).shape](u)


def term_mask(
    cond: Condition | str,
    loss_mask: Tensor,
    has_context: Tensor,
    positions: Tensor | None = None,
    max_position: int | None = None,
    *,
    lengths: Tensor | None = None,
    max_length: int | None = None,
) -> Tensor:
    """Which tokens carry a term: bool [N].

    A token does if the loss sees it (`loss_mask`), its rollout has privileged context (not required for `u_source`
    "student"), its response position (`positions`, int64, from 0) is below `max_position` and its response's number of
    tokens (`lengths`, int64) is below `max_length`.
    """
    mask = entropy_mask(resolve_condition(cond), loss_mask, has_context)
    if max_position is not None:
        if positions is None:
            raise ValueError("term_max_position needs the tokens' response positions")
        mask = mask & (positions < max_position)
    if max_length is not None:
        if lengths is None:
            raise ValueError("term_max_length needs the lengths of the tokens' responses")
        mask = mask & (lengths < max_length)
    return mask


def entropy_mask(cond: Condition | str, loss_mask: Tensor, has_context: Tensor) -> Tensor:
    """Which tokens count in the gate's H: bool [N].

    Those of `context_tokens`; for `u_source` "student", which needs no context, all tokens that the loss sees.
    """
    return loss_mask if resolve_condition(cond).u_source == "student" else context_tokens(loss_mask, has_context)


def context_tokens(loss_mask: Tensor, has_context: Tensor) -> Tensor:
    """Tokens with a meaningful teacher score: bool [N], those that the loss sees in rollouts with privileged
    context."""
    return loss_mask & has_context


def resolve_condition(cond: Condition | str) -> Condition:
    """`cond` itself, or the condition of that name."""
    return condition(cond) if isinstance(cond, str) else cond

"""The divergence between two softmax distributions on tiles [n, v] of their logits, and its gradient, by PyTorch
operators. `triton_tile.py` has the same functions as CUDA kernels; `tile_kernels.py` chooses.

With p the student's and q the teacher's distribution, r = p / q, and D = sum_v q_v f(r_v), the derivative in the
student's logits is (Eq. 5 in its dense form; q is a constant)

    dD / dz_v = p_v (f'(r_v) - F)    with    F = sum_w p_w f'(r_w)

    Jensen-Shannon   D = b KL(q, m) + (1 - b) KL(p, m)    m = b q + (1 - b) p    f' = (1 - b) log(p / m)
    reverse KL       D = KL(p, q)                                                f' = log(p / q)
    forward KL       D = KL(q, p)                                                dD / dz_v = p_v - q_v

(f' up to a constant, which cancels.) F is a sum over the complete vocabulary, so a tile takes two passes with one
collective between them: `divergence_sums_` computes this rank's part of the sums and, here, leaves p f' and p in the
tiles; `divergence_gradient_` subtracts F p. Numbers that underflow do no harm: p = 0 only ever meets finite factors,
because log p comes from the logits and m is kept above the smallest normal number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from asd_megatron.ops.softmax_tile import Softmax, Targets, add_target_, exp, slabs

LN_2 = math.log(2)
Kind = Literal["jensen_shannon", "reverse_kl", "forward_kl"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Divergence:
    """Which divergence. `mixture` is b of the generalised Jensen-Shannon divergence, in (0, 1): the teacher's weight
    in m. 0.5 is the symmetric one, at most log 2; the others ignore it. Raises ValueError for values outside these."""

    kind: Kind = "jensen_shannon"
    mixture: float = 0.5

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"divergence {self.kind!r} does not exist; choose one of {', '.join(KINDS)}")
        if not 0 < self.mixture < 1:
            raise ValueError(f"the mixture must lie between 0 and 1: it is {self.mixture}")


class DivergenceTile(NamedTuple):
    """The logits of both [n, v], each row's softmax p of the student and q of the teacher, and `coefficient` [n]: the
    loss is coefficient * D."""

    student: Tensor
    teacher: Tensor
    p: Softmax
    q: Softmax
    coefficient: Tensor
    divergence: Divergence


class RowValues(NamedTuple):
    """Of every row of a tile [n]: `divergence` D and `mean` F (both of the chosen divergence), KL(p, q), KL(q, p), all
    in nats, and whether both distributions have their maximum at the same token (1 or 0)."""

    divergence: Tensor
    mean: Tensor
    reverse_kl: Tensor
    forward_kl: Tensor
    agreement: Tensor


SUMS = 5


def divergence_sums_(tile: DivergenceTile) -> Tensor:
    """This rank's part of the sums behind `row_values`, [5, n].

    May overwrite both logits with what `divergence_gradient_` of the same implementation needs; here `student` becomes
    coefficient * p f' (forward KL: coefficient * (p - q)), `teacher` becomes p.
    """
    student, teacher, softmax, teacher_softmax, coefficient, divergence = tile
    n, v = student.shape
    out = torch.zeros(SUMS, n, dtype=student.dtype, device=student.device)
    if v == 0:
        return out
    smallest = torch.finfo(student.dtype).tiny
    scale = coefficient * (1 - divergence.mixture) if divergence.kind == "jensen_shannon" else coefficient
    for rows, (logp, logq), (p, q, product) in slabs(student, teacher, scratch=3):
        cross, teacher_cross, mean, mixed, together = out[:, rows]
        logp.sub_(softmax.maximum[rows, None])
        logq.sub_(teacher_softmax.maximum[rows, None])
        together.copy_(torch.add(logp, logq, out=p).amax(1) == 0)
        exp(logp.add_(softmax.top_logprob[rows, None]), p)
        exp(logq.add_(teacher_softmax.top_logprob[rows, None]), q)
        torch.sum(torch.mul(p, logq, out=product), 1, out=cross)
        torch.sum(torch.mul(q, logp, out=product), 1, out=teacher_cross)
        if divergence.kind == "forward_kl":
            torch.sub(p, q, out=logp)
        elif divergence.kind == "reverse_kl":
            logp.sub_(logq).mul_(p)
        else:
            # By log2: on CPUs torch.log is MKL's, which is far slower.
            log2m = torch.lerp(p, q, divergence.mixture, out=logq).clamp_(min=smallest).log2_()
            torch.sum(torch.mul(q, log2m, out=product), 1, out=mixed)
            mixed.mul_(LN_2)
            logp.sub_(log2m, alpha=LN_2).mul_(p)
            torch.sum(logp, 1, out=mean)
        logp.mul_(scale[rows, None])
        logq.copy_(p)
    return out


def row_values(sums: Tensor, entropy: Tensor, teacher_entropy: Tensor, divergence: Divergence) -> RowValues:
    """From `sums` [5, n] over the complete vocabulary and the two entropies [n]."""
    cross, teacher_cross, mean, mixed, together = sums
    reverse, forward = -entropy - cross, -teacher_entropy - teacher_cross
    if divergence.kind == "reverse_kl":
        value, derivative = reverse, reverse
    elif divergence.kind == "forward_kl":
        value, derivative = forward, torch.zeros_like(forward)
    else:
        b = divergence.mixture
        derivative = (1 - b) * mean
        value = derivative + b * (-teacher_entropy - mixed)
    # Rounding must not make a divergence negative.
    value, reverse, forward = (x.clamp(min=0) for x in (value, reverse, forward))
    return RowValues(value, derivative, reverse, forward, (together > 0).to(sums.dtype))


def divergence_gradient_(
    tile: DivergenceTile,
    mean: Tensor,
    target: Targets,
    g_logprob: Tensor,
    g_entropy: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient in the student's logits [n, v], in `dtype`, of coefficient * D + g_logprob * log p(target) +
    g_entropy * entropy, summed over rows.

    `tile` as `divergence_sums_` left it; overwrites it. `mean` [n] is F. The other arguments are those of
    `softmax_tile.logit_gradient_`.
    """
    student, p = tile.student, tile.teacher
    student.addcmul_(p, (tile.coefficient * mean + g_logprob)[:, None], value=-1)
    if g_entropy is not None:
        for rows, (slab, weights), (logp,) in slabs(student, p):
            torch.clamp(weights, min=torch.finfo(p.dtype).tiny, out=logp).log2_().mul_(LN_2).add_(
                tile.p.entropy[rows, None]
            )
            slab.addcmul_(weights.mul_(logp), g_entropy[rows, None], value=-1)
    add_target_(student, target, g_logprob)
    return student.to(dtype)

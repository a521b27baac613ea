"""The divergence between two softmax distributions on tiles of their logits, and its gradient, by PyTorch operators.
`triton_tile.py` has the same functions as CUDA kernels; `tile_kernels.py` chooses.

With p the student's and q the teacher's distribution, r = p / q, and D = sum_v q_v f(r_v), the derivative in the
student's logits is (Eq. 5 in its dense form; q is a constant)

    dD / dz_v = p_v (f'(r_v) - F)    with    F = sum_w p_w f'(r_w)

    Jensen-Shannon   D = b KL(q, m) + (1 - b) KL(p, m)    m = b q + (1 - b) p    f' = (1 - b) log(p / m)
    reverse KL       D = KL(p, q)                                                f' = log(p / q)
    forward KL       D = KL(q, p)                                                dD / dz_v = p_v - q_v

(f' up to a constant, which cancels.) F is a sum over the complete vocabulary, so a tile takes two passes, with a
collective between them where the vocabulary is sharded. The first computes sums and leaves p f' and p in the tile, the
second (`divergence_gradient_`) subtracts F p. What the first does to a slab of rows:

    x, y [r, v]             logits of student and teacher less their row's maximum
    w = e^x, w' = e^y       not normalised: p = w / t, q = w' / t' with the totals t, t' [r]
    m' = w + k w'           = m t / (1 - b), with the row's factor k = (b / t') / ((1 - b) / t)
    x - log m', y - log m'  = log(p / m), log(q / m) but for constants of the row
    four dot products       of {w, w'} with those two: both KL divergences and both parts of D

Every constant and factor of a row is applied to the row's sums, [r] numbers instead of [r, v]. The dot products are of
logarithms of ratios, not of log-probs, so that a small divergence is a sum of small numbers. Numbers that underflow do
no harm: w = 0 only ever meets finite factors, because x comes from the logits and m' is kept above the smallest normal
number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from asd_megatron.ops.gemm import exact_products
from asd_megatron.ops.softmax_tile import (
    Softmax,
    Targets,
    add_segments,
    add_target_,
    exp,
    merged,
    row_dots,
    slab_step,
    slabs,
    softmax_statistics,
    target_logits,
)

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
    """`logits` [2, n, v] of the student and of the teacher, each row's softmax p and q over the complete vocabulary,
    and `coefficient` [n]: the loss is coefficient * D."""

    logits: Tensor
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
"""Rows of the sums over a tile's columns: sum p log(p / q), sum q log(q / p), and of Jensen-Shannon sum p log(p / m)
and sum q log(q / m); then 1 where a column has the maximum of both, otherwise 0."""


def complete_divergence_(
    logits: Tensor, target: Targets, coefficient: Tensor, divergence: Divergence
) -> tuple[DivergenceTile, Tensor]:
    """(tile, its sums [5, n]) where the columns of `logits` [2, n, v] are the complete vocabulary.

    The same as `softmax_statistics` of both, `merged`, and `divergence_sums_`, but every logit is read from memory and
    exponentiated once.
    """
    if not logits.numel():
        p, q = (merged(softmax_statistics(part, target)[None]) for part in logits)
        tile = DivergenceTile(logits, p, q, coefficient, divergence)
        return tile, divergence_sums_(tile)
    targets = torch.stack([target_logits(part, target) for part in logits])
    found = _first_pass_(logits, coefficient, divergence, None)
    assert found.moment is not None
    statistics = torch.stack([found.maximum, found.total, found.moment, targets], 1)  # [2, 4, n]
    p, q = (merged(part[None]) for part in statistics)
    tile = DivergenceTile(logits, p, q, coefficient, divergence)
    return tile, _sums(tile, found)


def divergence_sums_(tile: DivergenceTile) -> Tensor:
    """This rank's part of the sums behind `row_values`, [5, n].

    May overwrite the logits with what `divergence_gradient_` of the same implementation needs; here the student's
    become w, the teacher's coefficient * p (f' + a constant of the row) (forward KL: coefficient * (p - q)).
    """
    logits, p, q, coefficient, divergence = tile
    if not logits.numel():
        return logits.new_zeros(SUMS, logits.shape[1])
    maximum = torch.stack([p.maximum, q.maximum])
    total = torch.stack([p.top_logprob, q.top_logprob]).neg_().exp_()
    return _sums(tile, _first_pass_(logits, coefficient, divergence, (maximum, total)))


class _Found(NamedTuple):
    """Of a tile's rows: `maximum` [2, n] and `total` [2, n] of the weights e^(logit - maximum), over the complete
    vocabulary; `mass` [2, n], the sum of this rank's weights; `moment` [2, n], of weight * (logit - maximum);
    `together` [n], where both maxima are in one column; `dots` [2, 2, n] of `_slab_dots_`."""

    maximum: Tensor
    total: Tensor
    mass: Tensor
    moment: Tensor | None
    together: Tensor
    dots: Tensor


def _first_pass_(
    logits: Tensor, coefficient: Tensor, divergence: Divergence, known: tuple[Tensor, Tensor] | None
) -> _Found:
    """`known`: maximum and total over all ranks; None: they are those of `logits` [2, n, v], and the moment is wanted.

    What can be done for all rows of the tile at once is done outside of the loop.
    """
    _, n, v = logits.shape
    scale = coefficient * (1 - divergence.mixture) if divergence.kind == "jensen_shannon" else coefficient
    # Five tensors, in slabs for three: with 40 calls a slab, twice the rows gain more than they lose in the cache.
    step = slab_step(logits[0], 3)
    memory = logits.new_empty((3, min(step, n), v))
    slabs = zip(logits.split(step, 1), scale[:, None].split(step), strict=True)
    given = None if known is None else [column[..., None].split(step, 1) for column in known]
    maxima, totals, masses, moments, together, dots = [], [], [], [], [], []
    with exact_products():
        for number, (slab, factor) in enumerate(slabs):
            work = memory if slab.shape[1] == memory.shape[1] else memory[:, : slab.shape[1]]
            shifted, scratch = work[:2], work[2]
            maximum = slab.amax(2, keepdim=True) if given is None else given[0][number]
            weights = exp(torch.sub(slab, maximum, out=shifted), slab)
            mass = weights.sum(2, keepdim=True)
            total = mass if given is None else given[1][number]
            if given is None:
                moments.append(row_dots(weights, shifted))
            x, y = shifted.unbind()
            together.append(torch.add(x, y, out=scratch).amax(1))
            dots.append(_slab_dots_(weights, shifted, scratch, total, factor, divergence))
            maxima.append(maximum)
            totals.append(total)
            masses.append(mass)
    return _Found(
        torch.cat(maxima, 1)[..., 0],
        torch.cat(totals, 1)[..., 0],
        torch.cat(masses, 1)[..., 0],
        add_segments(moments, n).diagonal().t() if moments else None,
        (torch.cat(together) == 0).to(logits.dtype),
        add_segments(dots, n),
    )


def _slab_dots_(
    weights: Tensor, shifted: Tensor, scratch: Tensor, total: Tensor, scale: Tensor, divergence: Divergence
) -> Tensor:
    """`row_dots` of the weights [2, r, v] with [log(p / m), log(q / m)], but for the constants of `_offsets`; with
    log(p / q) alone for the KL divergences. Overwrites all but the student's weights: the teacher's with
    scale * p f', or scale * (p - q)."""
    (x, y), (w, other), (t, other_t) = shifted.unbind(), weights.unbind(), total.unbind()
    if divergence.kind == "jensen_shannon":
        factor = (t / other_t).mul_(divergence.mixture / (1 - divergence.mixture))
        # By log2: on CPUs torch.log is MKL's, which is far slower.
        mixture = torch.addcmul(w, other, factor, out=scratch).clamp_(min=torch.finfo(w.dtype).tiny)
        dots = row_dots(weights, shifted.sub_(mixture.log2_(), alpha=LN_2))
    else:
        x.sub_(y)
        dots = row_dots(weights, shifted[:1])
    if divergence.kind == "forward_kl":
        torch.mul(w, scale / t, out=x)
        torch.sub(x, other.mul_(scale / other_t), out=other)
    else:
        torch.mul(x.mul_(scale / t), w, out=other)
    return dots


def _sums(tile: DivergenceTile, found: _Found) -> Tensor:
    """[5, n]."""
    dots = (found.dots + found.mass[:, None] * _offsets(tile)[: len(found.dots[0])]) / found.total[:, None]
    student, teacher = dots[0, 0], dots[1, -1]
    if tile.divergence.kind == "jensen_shannon":
        reverse, forward = student - dots[0, 1], teacher - dots[1, 0]
    else:
        reverse, forward = student, -teacher
    return torch.stack([reverse, forward, student, teacher, found.together])


def _offsets(tile: DivergenceTile) -> Tensor:
    """[2, n]: log(p / m) and log(q / m), or log(p / q), less the numbers that `_slab_dots_` has in their place."""
    norm = tile.p.top_logprob - tile.q.top_logprob
    if tile.divergence.kind == "jensen_shannon":
        return torch.stack([torch.zeros_like(norm), -norm]) - math.log(1 - tile.divergence.mixture)
    return torch.stack([norm, norm])


def row_values(sums: Tensor, divergence: Divergence) -> RowValues:
    """From `sums` [5, n] over the complete vocabulary."""
    reverse, forward, student, teacher, together = sums
    if divergence.kind == "reverse_kl":
        value, derivative = reverse, reverse
    elif divergence.kind == "forward_kl":
        value, derivative = forward, torch.zeros_like(forward)
    else:
        b = divergence.mixture
        derivative = (1 - b) * student
        value = derivative + b * teacher
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
    weights, gradient = tile.logits
    constant = tile.coefficient * mean + g_logprob
    if tile.divergence.kind == "jensen_shannon":
        constant = constant - tile.coefficient * (1 - tile.divergence.mixture) * _offsets(tile)[0]
    elif tile.divergence.kind == "reverse_kl":
        constant = constant - tile.coefficient * _offsets(tile)[0]
    norm = tile.p.top_logprob.exp()[:, None]  # p = norm * weights
    if g_entropy is None:
        torch.addcmul(gradient, weights, constant[:, None] * norm, value=-1, out=weights)
    else:
        tiny = torch.finfo(weights.dtype).tiny
        for rows, (w, slab), (logp,) in slabs(weights, gradient):
            # p (constant + g_entropy (log p + entropy))
            logp = torch.clamp(w, min=tiny, out=logp).log2_().mul_(LN_2)
            logp.add_((tile.p.top_logprob + tile.p.entropy)[rows, None]).mul_(g_entropy[rows, None])
            logp.add_(constant[rows, None]).mul_(norm[rows])
            torch.addcmul(slab, logp, w, value=-1, out=w)
    add_target_(weights, target, g_logprob)
    return weights.to(dtype)

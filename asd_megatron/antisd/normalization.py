"""Optional standardisation of the per-token term. The all-reduce between the two calls is the caller's:

    statistics = term_statistics(term, mask, segment, segments)  # local sums
    dist.all_reduce(statistics)                                  # over ranks that hold other tokens of the segments
    term = finish_term(term, mask, statistics=statistics, segment=segment, clip=term_clip)

`sequence` and `demean` (which subtracts the mean alone): a segment is a rollout; sum over the context-parallel group
when its ranks hold parts of a rollout.
`batch`: one segment (`segment=None`); sum over the data- and context-parallel ranks that hold different tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

STD_FLOOR = 1e-6


def term_statistics(term: Tensor, mask: Tensor, segment: Tensor | None = None, segments: int = 1) -> Tensor:
    """(sum, sum of squares, count) of the unmasked tokens of each segment: float64 [segments, 3].

    Statistics of disjoint tokens add up.

    Args:
        term: [N]. mask: bool [N], the tokens that carry a term. segment: int64 [N] in [0, segments), or None for one
            segment.
    """
    values = torch.where(mask, term.detach().double(), 0.0)
    columns = torch.stack([values, values.square(), mask.double()], dim=1)
    if segment is None:
        return columns.sum(0, keepdim=True)
    return columns.new_zeros(segments, 3).index_add_(0, segment, columns)


def moments(statistics: Tensor) -> tuple[Tensor, Tensor]:
    """[S, 3] statistics -> mean [S] and population standard deviation [S], float64.

    The deviation is at least 1e-6, so that equal terms become 0. An empty segment has mean 0.
    """
    total, squares, count = statistics.unbind(1)
    count = count.clamp(min=1)
    mean = total / count
    variance = (squares / count - mean.square()).clamp(min=0)
    return mean, variance.sqrt().clamp(min=STD_FLOOR)


def normalize_term(term: Tensor, mean: Tensor, std: Tensor, clip: float | None = None) -> Tensor:
    """(term - mean) / std, then clamped to +-clip, in the dtype of `term` [N]; `mean` and `std` broadcast to it."""
    scaled = ((term.detach() - mean) / std).to(term.dtype)
    return scaled if clip is None else scaled.clamp(-clip, clip)


def finish_term(
    term: Tensor,
    mask: Tensor,
    *,
    statistics: Tensor | None = None,
    segment: Tensor | None = None,
    clip: float | None = None,
    scale: bool = True,
) -> Tensor:
    """The term as the advantage uses it: [N], dtype of `term`.

    Normalised by the unmasked tokens' (globally summed) `statistics` when given, clamped to +-`clip`, and exactly 0
    where `mask` is False, in this order: a masked token neither enters the statistics nor receives minus the mean.
    `scale` False: the mean is subtracted, the standard deviation is not divided by.
    """
    if statistics is not None:
        mean, std = moments(statistics)
        if segment is not None:
            mean, std = mean[segment], std[segment]
        term = normalize_term(term, mean, std if scale else torch.ones_like(std), clip)
    elif clip is not None:
        term = term.clamp(-clip, clip)
    return torch.where(mask, term, torch.zeros_like(term)).detach()

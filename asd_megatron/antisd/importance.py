"""Importance sampling of off-policy rollouts (TIS: truncated, MIS: masked): sampled by an engine whose arithmetic
differs or by older weights.

With d_t = s_t - b_t (scoring minus behaviour log-prob), the ratio of a token is exp of

* `token`: d_t, its own;
* `sequence`: the sum of d over the response's sampled tokens, the exact ratio of the whole response;
* `geometric`: their mean, a per-token size that long responses do not inflate.

Truncated: min(ratio, cap). Masked: the ratio inside [floor, cap], 0 outside, so that tokens on which sampler and policy
disagree most do not train. The weights are constants and enter no denominator of the loss.

The sums over a response come without their all-reduce, which is the caller's, as in `normalization`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Level = Literal["token", "sequence", "geometric"]


def ratio_statistics(scoring: Tensor, behaviour: Tensor, mask: Tensor, segment: Tensor, segments: int) -> Tensor:
    """(sum of d, count) of the unmasked tokens of each segment: float64 [segments, 2]. Those of disjoint tokens add up.

    Args:
        scoring, behaviour: log-probs [N]. mask: bool [N], the sampled tokens that the loss sees.
        segment: int64 [N] in [0, segments), each token's rollout.
    """
    difference = torch.where(mask, scoring.detach().double() - behaviour.detach().double(), 0.0)
    columns = torch.stack([difference, mask.double()], dim=1)
    return columns.new_zeros(segments, 2).index_add_(0, segment, columns)


def importance_weights(
    scoring: Tensor,
    behaviour: Tensor,
    cap: float,
    floor: float | None = None,
    *,
    level: Level = "token",
    statistics: Tensor | None = None,
    segment: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(weights [N] of the dtype of `scoring`, affected bool [N]: weights that were cut or set to 0), detached.

    Args:
        scoring: log-probs [N] under the trainer's weights before the first update. behaviour: of what sampled.
        cap: largest weight. floor: None truncates; otherwise ratios outside [floor, cap] get weight 0.
        level: of the ratio; all but `token` read the complete responses' `statistics` [S, 2] through `segment` [N].

    Raises ValueError when such a level has no statistics.
    """
    if level == "token":
        log_ratio = scoring.detach().double() - behaviour.detach().double()
    elif statistics is None or segment is None:
        raise ValueError(f"importance level {level} needs the responses' statistics and the tokens' segments")
    else:
        total, count = statistics.unbind(1)
        log_ratio = (total if level == "sequence" else total / count.clamp(min=1))[segment]
    ratio = log_ratio.exp()  # infinity is fine: above every cap
    affected = ratio > cap
    if floor is None:
        return ratio.clamp(max=cap).to(scoring.dtype), affected
    affected |= ratio < floor
    return torch.where(affected, 0.0, ratio).to(scoring.dtype), affected

"""Policy gradients with constant per-token advantages (Algorithm 1, line 11), and the entropy bonus.

The loss of a mini-batch is the sum of these losses over micro-batches, context-parallel slices and data-parallel ranks:
the weights contain the global denominators, so the loss cannot depend on how the batch was split.

With the ratio rho_t = exp(log p_t - log p_old_t) of a token of response i, all three have the gradient of `ppo_clip`
where every ratio is 1, as with one update a batch; they differ in later updates:

    ppo_clip   min(rho_t A_t, clip(rho_t) A_t)     PPO (arXiv 1707.06347, Eq. 7); two bounds: DAPO (2503.14476, Eq. 8)
    gspo       the same with the response's ratio s_i, the geometric mean of its rho_t (2507.18071, Eq. 7 and 13)
    cispo      stop-gradient(clip(rho_t)) A_t log p_t: no token loses its gradient (2506.13585, Eq. 4 and 5)
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from asd_megatron.errors import UserError

PolicyLoss = Literal["ppo_clip", "gspo", "cispo"]


class AggregationError(UserError, ValueError):
    """An aggregation that does not exist or lacks its constant."""


def token_weights(
    mask: Tensor,
    segment: Tensor,
    *,
    aggregation: str = "token_mean",
    total_tokens: int,
    total_sequences: int,
    lengths: Tensor | None = None,
    constant_length: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The weight of every token in the loss: [N] of `dtype`, 0 where `mask` is False.

    * `token_mean`: 1 / total_tokens.
    * `sequence_mean`: 1 / (length of the token's rollout * total_sequences), the mean over rollouts of their token
      means.
    * `constant_length`: 1 / (constant_length * total_sequences), no length bias at all.

    Args:
        mask: bool [N], the tokens that the loss sees. segment: int64 [N], each token's row in `lengths`.
        total_tokens: such tokens in the mini-batch, over all data-parallel ranks.
        total_sequences: rollouts with at least one such token, over all data-parallel ranks.
        lengths: [S] such tokens of each rollout; None: counted from `mask`, which must then hold complete rollouts.

    Raises AggregationError for an unknown aggregation or a missing constant.
    """
    if aggregation == "token_mean":
        denominator = torch.full(mask.shape, float(total_tokens), dtype=torch.float64, device=mask.device)
    elif aggregation == "sequence_mean":
        if lengths is None:
            rows = int(segment.max()) + 1 if segment.numel() else 0
            lengths = torch.zeros(rows, dtype=torch.int64, device=mask.device).index_add_(0, segment, mask.long())
        denominator = lengths.double()[segment] * total_sequences
    elif aggregation == "constant_length":
        if constant_length is None or constant_length < 1:
            raise AggregationError(
                "algorithm.aggregation constant_length needs algorithm.constant_length, a positive number of tokens"
            )
        denominator = torch.full(
            mask.shape, float(constant_length * total_sequences), dtype=torch.float64, device=mask.device
        )
    else:
        raise AggregationError(
            f"algorithm.aggregation {aggregation!r} does not exist; choose token_mean, sequence_mean or constant_length"
        )
    return torch.where(mask, 1.0 / denominator.clamp(min=1.0), 0.0).to(dtype)


def clipped_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    clip_low: float,
    clip_high: float,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """-sum_t w_t * i_t * min(rho_t * A_t, clip(rho_t, 1 - clip_low, 1 + clip_high) * A_t), with the ratio
    rho = exp(logprobs - old_logprobs).

    Args (all [N]):
        logprobs: of the weights being updated, with gradient.
        old_logprobs: of the scoring weights. With one update per batch pass `logprobs` itself: rho is then 1 in value,
            not in gradient.
        advantages, weights: constants, from `compose` and `token_weights`.
        importance: constant weights of off-policy rollouts, from `importance_weights`.

    Returns the scalar loss (a sum; tokens of weight 0 take no part whatever they hold) and `clipped`, bool [N]: the
    tokens whose gradient the clip removed.
    """
    log_ratio = logprobs - old_logprobs.detach()
    value = log_ratio.detach().exp()
    a = advantages.detach()
    used = weights != 0
    clipped = used & _beyond(value, a, clip_low, clip_high)
    # The gradient path sees only ratios that count: an overflow in an unused branch would turn 0 * inf into NaN.
    ratio = torch.where(used & ~clipped, log_ratio, 0.0).exp()
    ratio = torch.where(clipped, value.clamp(1 - clip_low, 1 + clip_high), ratio)
    scale = _scale(weights, importance)
    return -torch.where(used, scale * a * ratio, 0.0).sum(), clipped


def _beyond(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """bool [N]: where the clip is the smaller side of min(rho A, clip(rho) A), so that no gradient is left."""
    return ((advantages > 0) & (ratio > 1 + clip_high)) | ((advantages < 0) & (ratio < 1 - clip_low))


def _scale(weights: Tensor, importance: Tensor | None) -> Tensor:
    """The constant factor of every token [N]."""
    return weights.detach() if importance is None else weights.detach() * importance.detach()


def sequence_policy_loss(
    logprobs: Tensor,
    log_ratio: Tensor,
    advantages: Tensor,
    weights: Tensor,
    clip_low: float,
    clip_high: float,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """GSPO: -sum_t w_t * i_t * min(s_t * A_t, clip(s_t, 1 - clip_low, 1 + clip_high) * A_t) with the response's ratio

        s_i = (p(y_i) / p_old(y_i))^(1 / |y_i|) = exp(mean over its tokens of log p_t - log p_old_t)      (Eq. 7)
        s_t = stop-gradient(s_i) * p_t / stop-gradient(p_t)                                               (Eq. 14)

    s_t has the value s_i and the gradient s_i * grad log p_t, so that each token may have an advantage of its own, as
    the per-token term needs. With one advantage for all tokens of a response and the aggregation `sequence_mean` it is
    the gradient of s_i * A_i itself, because grad s_i = s_i / |y_i| * sum_t grad log p_t.

    Args (all [N]):
        logprobs: of the weights being updated, with gradient.
        log_ratio: log s_i of each token's response, a constant: the mean over all tokens of the response that the loss
            sees, whatever pack, tile or context-parallel rank they are on (`mean_log_ratio`).
        the others: as in `clipped_policy_loss`.

    Returns the scalar loss and `clipped`, bool [N]: tokens whose gradient the clip removed; with one advantage a
    response all of its tokens or none.
    """
    ratio, a = log_ratio.detach().exp(), advantages.detach()
    used = weights != 0
    clipped = used & _beyond(ratio, a, clip_low, clip_high)
    bounded = torch.where(clipped, ratio.clamp(1 - clip_low, 1 + clip_high), ratio)
    own = torch.where(used & ~clipped, logprobs, 0.0)  # the others have no gradient, whatever they hold
    scale = _scale(weights, importance)
    return -torch.where(used, scale * a * bounded * (own - own.detach()).exp(), 0.0).sum(), clipped


def mean_log_ratio(statistics: Tensor, segment: Tensor) -> Tensor:
    """log s_i of every token [N] from the sums over its response: `ratio_statistics` [S, 2] of the present and the old
    log-probs, complete over the ranks that hold tokens of the response. `segment`: int64 [N], rows of `statistics`."""
    total, count = statistics.unbind(1)
    return (total / count.clamp(min=1))[segment]


def cispo_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    clip_low: float,
    clip_high: float,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """CISPO: -sum_t w_t * i_t * stop-gradient(clip(rho_t, 1 - clip_low, 1 + clip_high)) * A_t * log p_t (Eq. 4 and 5).

    The ratio is a bounded weight of the plain policy gradient: it removes no token from it. The paper bounds it above
    alone: `clip_low` 1 makes the lower bound 0, which no ratio is below. Arguments as in `clipped_policy_loss`.

    Returns the scalar loss, whose value means nothing beside its gradient, and bool [N]: tokens whose weight was cut.
    """
    used = weights != 0
    own = torch.where(used, logprobs, 0.0)
    ratio = torch.where(used, own.detach() - old_logprobs.detach(), 0.0).exp()
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
    scale = _scale(weights, importance)
    return -torch.where(used, scale * bounded * advantages.detach() * own, 0.0).sum(), used & (bounded != ratio)


def entropy_bonus(entropy: Tensor, weights: Tensor, coefficient: float) -> Tensor:
    """-coefficient * sum_t w_t * H_t, to be added to the loss: it raises the policy's entropy (A3C, arXiv 1602.01783,
    section 4). A scalar with a gradient in `entropy` [N], the full-vocabulary entropy of each token's distribution at
    the sampling temperature (nats); the head differentiates it exactly, dH / dz_v = -p_v (log p_v + H).

    The mean has the policy loss's weights [N] and denominators. Tokens of weight 0 take no part whatever they hold.
    """
    used = weights != 0
    return -coefficient * torch.where(used, weights.detach() * torch.where(used, entropy, 0.0), 0.0).sum()

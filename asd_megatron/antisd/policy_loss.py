"""The clipped policy gradient with constant per-token advantages (Algorithm 1, line 11).

The loss of a mini-batch is the sum of these losses over micro-batches, context-parallel slices and data-parallel ranks:
the weights contain the global denominators, so the loss cannot depend on how the batch was split.
"""

from __future__ import annotations

import torch
from torch import Tensor

from asd_megatron.errors import UserError


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
    clipped = used & (((a > 0) & (value > 1 + clip_high)) | ((a < 0) & (value < 1 - clip_low)))
    # The gradient path sees only ratios that count: an overflow in an unused branch would turn 0 * inf into NaN.
    ratio = torch.where(used & ~clipped, log_ratio, 0.0).exp()
    ratio = torch.where(clipped, value.clamp(1 - clip_low, 1 + clip_high), ratio)
    scale = weights.detach() if importance is None else weights.detach() * importance.detach()
    return -torch.where(used, scale * a * ratio, 0.0).sum(), clipped

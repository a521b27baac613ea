"""The method on a data-parallel rank's tokens: from log-probs to per-token terms, advantages and losses.

Applies the pure functions of `antisd` to typed columns (`columns.py`). All tensors are [N]; communication is left to
the caller, except in `freeze`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from asd_megatron.antisd import (
    Condition,
    KlPenalty,
    PolicyLoss,
    cispo_policy_loss,
    clipped_policy_loss,
    compose,
    entropy_bonus,
    finish_term,
    importance_weights,
    kl_loss,
    mean_log_ratio,
    penalised_advantage,
    ratio_statistics,
    sequence_policy_loss,
    signal,
    term,
    term_mask,
    term_statistics,
    token_weights,
    without_outliers,
)
from asd_megatron.antisd.importance import Level
from asd_megatron.ops.vocab_divergence import Divergence
from asd_megatron.trainer.columns import FrozenScores, LossConstants, LossInputs, Scores, TokenInputs
from asd_megatron.trainer.local_batch import LocalBatch


@dataclass(frozen=True)
class ExactTerm:
    """The per-token term as the exact divergence D: the token's loss is its policy loss with A_seq alone, plus `sign` *
    lambda * D with the same weight. Ascent on D has sign -1, descent +1."""

    divergence: Divergence
    sign: int


@dataclass(frozen=True)
class Method:
    """The recipe's algorithm section as plain values; see `antisd` for what each does.

    `importance_cap` None: no correction of off-policy rollouts. `importance_floor` None: weights are truncated at the
    cap; a number: weights outside [floor, cap] are masked (set to 0). `exact` None: the term is estimated from the
    sampled token. `advantage_weight`: of A_seq. `outlier_limit`: u counts as 0 in the term where |u| is above it; a run
    measures it in its first steps. `kl` None: no penalty on the divergence from the initial weights. `policy_loss`:
    what becomes of the policy ratio, see `antisd.policy_loss`. `entropy_coefficient`: of the entropy bonus, 0: none.
    """

    condition: Condition
    clip_low: float = 0.2
    clip_high: float = 0.2
    aggregation: str = "token_mean"
    constant_length: int | None = None
    pmi_clip: float | None = None
    term_normalization: str = "none"
    term_clip: float | None = None
    term_max_position: int | None = None
    term_max_length: int | None = None
    advantage_weight: float = 1.0
    outlier_limit: float | None = None
    importance_cap: float | None = None
    importance_floor: float | None = None
    importance_level: Level = "token"
    exact: ExactTerm | None = None
    kl: KlPenalty | None = None
    policy_loss: PolicyLoss = "ppo_clip"
    entropy_coefficient: float = 0.0


class Sums(NamedTuple):
    """Sums over this rank's tokens that must be complete before any of the tokens' losses; the caller adds them over
    the ranks that hold other tokens of the same rollouts. None: the recipe does not need them."""

    term: Tensor | None = None  # float64, of `term_statistics`
    ratio: Tensor | None = None  # float64, of `ratio_statistics`


NO_SUMS = Sums()
OVER_RESPONSES = ("sequence", "demean")
"""Normalizations of the term over the tokens of each response."""


def token_inputs(batch: LocalBatch, method: Method) -> TokenInputs:
    """The columns of the batch's local tokens that no forward pass computes."""
    loss_mask = batch.column(batch.loss_mask, torch.bool)
    has_context = batch.per_rollout(lambda e: e.has_context, torch.bool)
    segment, positions = batch.segments(), batch.positions()
    weight = torch.zeros(batch.table.tokens, dtype=torch.float32, device=loss_mask.device)
    for m in range(batch.mini_batches):
        rows, counts = batch.mini_batch_rows(m), batch.counts(m)
        weight[rows] = token_weights(
            loss_mask[rows],
            segment[rows],
            aggregation=method.aggregation,
            total_tokens=counts.tokens,
            total_sequences=counts.sequences,
            constant_length=method.constant_length,
        )
    return TokenInputs(
        group_advantage=batch.per_rollout(lambda e: e.group_advantage),
        weight=weight,
        term_mask=term_mask(
            method.condition,
            loss_mask,
            has_context,
            positions,
            method.term_max_position,
            lengths=batch.per_rollout(lambda e: len(e.rollout.response_ids), torch.int64),
            max_length=method.term_max_length,
        ),
        has_context=has_context,
        loss_mask=loss_mask,
        engine_logprobs=batch.column(lambda e: e.rollout.logprobs),
        segment=segment,
    )


def raw_term(tokens: LossInputs, student: Tensor, method: Method) -> tuple[Tensor, Tensor]:
    """(u, unnormalised term) under the student's scoring log-probs; both exactly 0 where the rollout has no context."""
    teacher = None if tokens.teacher is None else tokens.teacher.logprobs
    if not method.condition.sign and teacher is None:
        zero = student.detach().new_zeros(student.shape)
        return zero, zero
    u = signal(method.condition, student, teacher, tokens.inputs.has_context)
    return u, term(method.condition, without_outliers(u, method.outlier_limit), pmi_clip=method.pmi_clip)


def loss_constants(tokens: LossInputs, student: Tensor, method: Method, sums: Sums = NO_SUMS) -> LossConstants:
    """u, the finished term, the advantage and the importance weight of every token, detached.

    Args:
        student: log-probs [N] under the scoring weights.
        sums: of the complete rollouts (or, with `term_normalization: batch`, of the complete batch), where needed.
    """
    u, q = raw_term(tokens, student, method)
    if method.exact is not None:
        q = torch.zeros_like(q)  # the head adds the term to the loss; the advantage is A_seq
    by_rollout = sums.term is not None and method.term_normalization in OVER_RESPONSES
    q = finish_term(
        q,
        tokens.inputs.term_mask,
        statistics=sums.term,
        segment=tokens.inputs.segment if by_rollout else None,
        clip=method.term_clip,
        scale=method.term_normalization != "demean",
    )
    advantage = compose(method.condition, tokens.inputs.group_advantage, q, tokens.lam, weight=method.advantage_weight)
    if method.kl is not None and method.kl.in_advantage:
        assert tokens.reference is not None, "the plan has a reference scoring pass"
        advantage = penalised_advantage(advantage, student, tokens.reference.logprobs, method.kl.coefficient)
    if method.importance_cap is None:
        return LossConstants(u, q, advantage)
    weights, affected = importance_weights(
        student,
        tokens.inputs.engine_logprobs,
        method.importance_cap,
        method.importance_floor,
        level=method.importance_level,
        statistics=sums.ratio,
        segment=tokens.inputs.segment,
    )
    return LossConstants(u, q, advantage, weights, affected.to(weights.dtype))


def local_sums(tokens: LossInputs, student: Tensor, method: Method, rollouts: int) -> Sums:
    """This rank's sums over its tokens, under the scoring log-probs `student`; `rollouts`: in the rank's table."""
    inputs = tokens.inputs
    of_term = of_ratio = None
    if method.term_normalization != "none" and method.condition.sign:
        _, q = raw_term(tokens, student, method)
        if method.term_normalization in OVER_RESPONSES:
            of_term = term_statistics(q, inputs.term_mask, inputs.segment, max(rollouts, 1))
        else:
            of_term = term_statistics(q, inputs.term_mask)
    if method.importance_cap is not None and method.importance_level != "token":
        of_ratio = ratio_statistics(student, inputs.engine_logprobs, inputs.loss_mask, inputs.segment, max(rollouts, 1))
    return Sums(of_term, of_ratio)


def freeze(tokens: LossInputs, student: Scores, method: Method, rollouts: int, dp: dist.ProcessGroup) -> FrozenScores:
    """Loss constants of the rank's complete table from a scoring pass of the student, before the first update.

    The scores' log-probs are the old ones of the policy ratio too. Collective over `dp` when the term is normalised
    over the batch. Columns are complete on every context-parallel rank, so nothing is summed over those.
    """
    sums = local_sums(tokens, student.logprobs, method, rollouts)
    if sums.term is not None and method.term_normalization == "batch" and dp.size() > 1:
        dist.all_reduce(sums.term, group=dp)
    return FrozenScores(student, loss_constants(tokens, student.logprobs, method, sums), student.logprobs)


def policy_loss(
    inputs: TokenInputs,
    logprobs: Tensor,
    old: Tensor,
    constants: LossConstants,
    method: Method,
    ratio: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The tokens' part of the loss (global denominators included) and the mask of clipped tokens, bool [N].

    `logprobs` carry the gradient, `old` are those under the scoring weights in the same number format. `ratio`: of
    `gspo` with several updates a batch, the sums of `response_ratios`, complete over the ranks that hold tokens of the
    same responses; None: every response's ratio is 1, as it is with one update.
    """
    weight, bounds = inputs.weight, (method.clip_low, method.clip_high)
    if method.policy_loss == "gspo":
        log_ratio = torch.zeros_like(logprobs) if ratio is None else mean_log_ratio(ratio, inputs.segment)
        log_ratio = log_ratio.to(logprobs.dtype)
        return sequence_policy_loss(logprobs, log_ratio, constants.advantage, weight, *bounds, constants.importance)
    loss = cispo_policy_loss if method.policy_loss == "cispo" else clipped_policy_loss
    return loss(logprobs, old, constants.advantage, weight, *bounds, constants.importance)


def response_ratios(inputs: TokenInputs, logprobs: Tensor, old: Tensor, rollouts: int) -> Tensor:
    """This rank's sums for the responses' ratios of `gspo`: float64 [rollouts, 2], over the tokens that the loss sees
    (`ratio_statistics` of the present and the old log-probs)."""
    return ratio_statistics(logprobs, old, inputs.loss_mask, inputs.segment, max(rollouts, 1))


def add_entropy_bonus(loss: Tensor, inputs: TokenInputs, entropy: Tensor, method: Method) -> Tensor:
    """`loss` with the entropy bonus of the tokens; itself where the method has none, so that no head differentiates the
    entropy."""
    if method.entropy_coefficient == 0:
        return loss
    return loss + entropy_bonus(entropy, inputs.weight, method.entropy_coefficient)


def add_kl_loss(
    loss: Tensor, tokens: LossInputs, logprobs: Tensor, offset: Tensor, constants: LossConstants, method: Method
) -> Tensor:
    """`loss` with the KL penalty of the tokens, when the method has one that belongs to the loss.

    `offset`: scoring log-probs minus the old ones of the ratio, both under the scoring weights. It is 0 unless the
    update computes in another number format than the scores: the penalty's value then is that of the scores' format,
    its gradient the update's.
    """
    if method.kl is None or method.kl.in_advantage:
        return loss
    assert tokens.reference is not None, "the plan has a reference scoring pass"
    weight, reference = tokens.inputs.weight, tokens.reference.logprobs
    return loss + kl_loss(logprobs + offset, reference, weight, method.kl, constants.importance)

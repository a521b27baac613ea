"""The method applied to a data-parallel rank's tokens: columns in, per-token terms, advantages and losses out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from asd_megatron.antisd import (
    Condition,
    clipped_policy_loss,
    compose,
    finish_term,
    importance_weights,
    ratio_statistics,
    signal,
    term,
    term_mask,
    term_statistics,
    token_weights,
)
from asd_megatron.antisd.importance import Level
from asd_megatron.trainer.local_batch import LocalBatch


@dataclass(frozen=True)
class Method:
    """What the recipe says of the algorithm, as plain values. `importance_cap` None: no correction of off-policy
    rollouts; `importance_floor` None: it truncates, a number: it masks."""

    condition: Condition
    clip_low: float = 0.2
    clip_high: float = 0.2
    aggregation: str = "token_mean"
    constant_length: int | None = None
    pmi_clip: float | None = None
    term_normalization: str = "none"
    term_clip: float | None = None
    term_max_position: int | None = None
    importance_cap: float | None = None
    importance_floor: float | None = None
    importance_level: Level = "token"


Columns = Mapping[str, Tensor]
IMPORTANCE = ("importance", "importance_affected")


class Sums(NamedTuple):
    """Local sums that the recipe needs before any of their tokens' loss, to be added over the ranks that share the
    segments. None: not needed. `term`: of `term_statistics`; `ratio`: of `ratio_statistics`."""

    term: Tensor | None = None
    ratio: Tensor | None = None


NO_SUMS = Sums()


def token_inputs(batch: LocalBatch, method: Method) -> dict[str, Tensor]:
    """The columns [N] that do not depend on any forward pass: `group_advantage`, `weight` (global denominators of each
    row's mini-batch inside), `term_mask`, `has_context`, `loss_mask`, `engine_logprobs`, `segment` (local rollout
    number)."""
    sampled = batch.column(batch.sampled, torch.bool)
    has_context = batch.per_rollout(lambda e: e.has_context, torch.bool)
    segment, positions = batch.segments(), batch.positions()
    weight = torch.zeros(batch.table.tokens, dtype=torch.float32, device=sampled.device)
    for m in range(len(batch.shares)):
        rows, counts = batch.mini_batch_rows(m), batch.counts(m)
        weight[rows] = token_weights(
            sampled[rows],
            segment[rows],
            aggregation=method.aggregation,
            total_tokens=counts.tokens,
            total_sequences=counts.sequences,
            constant_length=method.constant_length,
        )
    return {
        "group_advantage": batch.per_rollout(lambda e: e.group_advantage),
        "weight": weight,
        "term_mask": term_mask(method.condition, sampled, has_context, positions, method.term_max_position),
        "has_context": has_context,
        "loss_mask": sampled,
        "engine_logprobs": batch.column(lambda e: e.rollout.logprobs),
        "segment": segment,
    }


def raw_term(columns: Columns, student: Tensor, method: Method) -> tuple[Tensor, Tensor]:
    """(u, unnormalised term) of the columns' tokens; both exactly 0 where the rollout has no context."""
    if not method.condition.sign and "teacher_logprobs" not in columns:
        zero = student.detach().new_zeros(student.shape)
        return zero, zero
    u = signal(method.condition, student, columns.get("teacher_logprobs"), columns["has_context"])
    return u, term(method.condition, u, pmi_clip=method.pmi_clip)


def advantages(
    columns: Columns, student: Tensor, method: Method, lam: float, *, statistics: Tensor | None = None
) -> dict[str, Tensor]:
    """`pmi`, `term`, `advantage` [N] under the scoring log-probs `student`. `statistics`: of the whole rollout or
    batch, when the term is normalised; one row means the whole batch, otherwise rows are indexed by the `segment`
    column."""
    u, q = raw_term(columns, student, method)
    segment = columns["segment"] if statistics is not None and method.term_normalization == "sequence" else None
    q = finish_term(q, columns["term_mask"], statistics=statistics, segment=segment, clip=method.term_clip)
    return {"pmi": u, "term": q, "advantage": compose(method.condition, columns["group_advantage"], q, lam)}


def importance(columns: Columns, scoring: Tensor, method: Method, ratio: Tensor | None = None) -> dict[str, Tensor]:
    """`importance` (constant weights) and `importance_affected` (1 where a weight was cut or set to 0) [N]; {} without
    a correction. `ratio`: of the whole responses, for the levels above the token."""
    if method.importance_cap is None:
        return {}
    weights, affected = importance_weights(
        scoring,
        columns["engine_logprobs"],
        method.importance_cap,
        method.importance_floor,
        level=method.importance_level,
        statistics=ratio,
        segment=columns["segment"],
    )
    return dict(zip(IMPORTANCE, (weights, affected.to(weights.dtype)), strict=True))


def local_sums(columns: Columns, student: Tensor, method: Method, rollouts: int) -> Sums:
    """This rank's sums over its tokens, under the scoring log-probs `student`."""
    term = ratio = None
    if method.term_normalization != "none" and method.condition.sign:
        _, q = raw_term(columns, student, method)
        by_rollout = method.term_normalization == "sequence"
        term = term_statistics(
            q, columns["term_mask"], columns["segment"] if by_rollout else None, max(rollouts, 1) if by_rollout else 1
        )
    if method.importance_cap is not None and method.importance_level != "token":
        ratio = ratio_statistics(
            student, columns["engine_logprobs"], columns["loss_mask"], columns["segment"], max(rollouts, 1)
        )
    return Sums(term, ratio)


def frozen_columns(
    columns: Columns, student: Tensor, method: Method, lam: float, rollouts: int, dp: Any
) -> dict[str, Tensor]:
    """Advantages and importance weights of the whole local table from a scoring pass of the student, before the first
    update. Collective over `dp` when the term is normalised over the batch. Columns are whole on every context-parallel
    rank, so no other sum is due."""
    sums = local_sums(columns, student, method, rollouts)
    if sums.term is not None and method.term_normalization == "batch" and dp.size() > 1:
        dist.all_reduce(sums.term, group=dp)
    found = advantages(columns, student, method, lam, statistics=sums.term)
    return found | importance(columns, student, method, sums.ratio)


def policy_loss(
    columns: Columns, logprobs: Tensor, old: Tensor, constants: Columns, method: Method
) -> tuple[Tensor, Tensor]:
    """The tokens' share of the loss (denominators inside) and the mask of clipped tokens. `constants`: the tokens'
    `advantage` and, with a correction, `importance`."""
    return clipped_policy_loss(
        logprobs,
        old,
        constants["advantage"],
        columns["weight"],
        method.clip_low,
        method.clip_high,
        constants.get("importance"),
    )

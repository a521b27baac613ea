"""The per-token tensors of one step as typed columns: what enters the loss and what comes out of it.

A column is [N], one entry per response token of this data-parallel rank, in the row order of `LocalBatch.table`.
Columns are complete on every rank of the model-parallel group. `at` picks the rows of one pack or of one tile of the
head, so the same classes describe a rank's complete table, a pack [rows of the pack] and a tile [rows of the tile].
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Columns:
    """Base of the classes below. Their fields are tensors of one length, other `Columns`, or None (not computed)."""

    def tensors(self) -> list[Tensor]:
        """All tensors in the order of the fields, nested ones included."""
        found: list[Tensor] = []
        for value in self._values().values():
            if isinstance(value, Tensor):
                found.append(value)
            elif value is not None:
                found += value.tensors()
        return found

    def at(self, rows: Tensor | slice) -> Self:
        """The same columns at `rows` (int64 indices or a slice) alone."""
        picked = {
            name: value[rows] if isinstance(value, Tensor) else None if value is None else value.at(rows)
            for name, value in self._values().items()
        }
        return replace(self, **picked)

    def put(self, rows: Tensor, values: Self) -> None:
        """Write `values` at `rows`, in the dtype of the columns written to."""
        for column, new in zip(self.tensors(), values.tensors(), strict=True):
            column[rows] = new.to(column.dtype)

    def _values(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class Scores(Columns):
    """Log-probability and full-vocabulary entropy of every response token, float32 nats at the sampling temperature.

    Teacher scores are 0, and mean nothing, where the rollout has no privileged context.
    """

    logprobs: Tensor
    entropy: Tensor


@dataclass(frozen=True)
class TokenInputs(Columns):
    """The inputs of the loss that no forward pass computes."""

    group_advantage: Tensor  # float32: A_seq of the token's rollout
    weight: Tensor  # float32: the token's weight in the loss, the global denominator of its mini-batch included
    term_mask: Tensor  # bool: tokens that carry a per-token term
    has_context: Tensor  # bool: the rollout has a privileged prompt
    loss_mask: Tensor  # bool: tokens that the loss sees
    engine_logprobs: Tensor  # float32 nats, as the rollout engine reported them
    segment: Tensor  # int64: local number of the token's rollout


@dataclass(frozen=True)
class LossConstants(Columns):
    """The constants of the policy gradient, one for each token: functions of the scoring log-probs, without gradient.

    The importance columns are None without a correction of off-policy rollouts.
    """

    pmi: Tensor  # u, nats (Eq. 4)
    term: Tensor  # q: what lambda multiplies, after clipping, normalization and masking
    advantage: Tensor  # A (Eq. 3, 6)
    importance: Tensor | None = None  # weight of the importance-sampling correction
    importance_affected: Tensor | None = None  # 1 where that weight was truncated or masked


@dataclass(frozen=True)
class FrozenScores(Columns):
    """The student's scores and the loss constants from a scoring pass before the first update: all updates of the batch
    share them.

    `old`: the log-probs that the policy ratio divides by, those of `student` unless the updates compute in another
    number format than the scoring pass (`PassPlan.bfloat16_student`)."""

    student: Scores
    constants: LossConstants
    old: Tensor


@dataclass(frozen=True)
class LossInputs(Columns):
    """All inputs of the loss beside the log-probs that are being differentiated.

    `teacher` is None when the step has no teacher scoring pass, `frozen` when it has none of the student, `reference`
    (under the initial weights) without a KL penalty.
    """

    inputs: TokenInputs
    lam: Tensor  # float32: this step's lambda for the token
    teacher: Scores | None
    frozen: FrozenScores | None = None
    reference: Scores | None = None


@dataclass(frozen=True)
class Divergences(Columns):
    """What the exact estimator reports of every token, nats, between the student's p and the teacher's q. They mean
    nothing where the rollout has no privileged context."""

    divergence: Tensor  # D, the recipe's divergence
    reverse_kl: Tensor  # KL(p, q)
    forward_kl: Tensor  # KL(q, p)
    agreement: Tensor  # 1 where both have their maximum at the same token


@dataclass(frozen=True)
class UpdateColumns(Columns):
    """What an update reports of every token, float32: `student` and `constants` under the weights before the first
    optimizer step, `clipped` 1 where the clip removed the gradient in any of the batch's updates. With the exact
    estimator `divergences` and `constants.term`, which is D, are under the weights of the token's last update. `old`
    is `FrozenScores.old` where that is not `student.logprobs`, None elsewhere."""

    student: Scores
    clipped: Tensor
    constants: LossConstants
    divergences: Divergences | None = None
    old: Tensor | None = None

    @classmethod
    def zeros(
        cls, tokens: int, device: torch.device, *, importance: bool, exact: bool, old: bool = False
    ) -> tuple[UpdateColumns, Tensor]:
        """(columns, the tensor [columns, N] that they are the rows of): one collective then moves all of them."""
        values = torch.zeros(6 + 2 * importance + 4 * exact + old, tokens, dtype=torch.float32, device=device)
        logprobs, entropy, clipped, *rest = values
        constants = 5 if importance else 3
        divergences = Divergences(*rest[constants : constants + 4]) if exact else None
        last = rest[-1] if old else None
        return cls(Scores(logprobs, entropy), clipped, LossConstants(*rest[:constants]), divergences, last), values


def score_columns(scores: Scores, of: str) -> dict[str, Tensor]:
    """`scores` under the names of `TokenTable`; `of`: `student`, `teacher` or `reference`."""
    return {f"{of}_logprobs": scores.logprobs, f"{of}_entropy": scores.entropy}


def table_columns(
    inputs: TokenInputs, teacher: Scores | None, update: UpdateColumns, reference: Scores | None = None
) -> dict[str, Tensor]:
    """A step's results under the names of `TokenTable`. Columns that were not computed are absent."""
    constants = update.constants
    found = {
        **score_columns(update.student, "student"),
        **({} if teacher is None else score_columns(teacher, "teacher")),
        "pmi": constants.pmi,
        "term": constants.term,
        "advantage": constants.advantage,
        "clipped": update.clipped,
        "loss_mask": inputs.loss_mask,
        "has_context": inputs.has_context,
    }
    if constants.importance is not None and constants.importance_affected is not None:
        found["importance"] = constants.importance
        found["importance_affected"] = constants.importance_affected
    if update.old is not None:
        found["update_logprobs"] = update.old
    if reference is not None:
        found["reference_logprobs"] = reference.logprobs
    if update.divergences is not None:
        found |= vars(update.divergences)
    return found

"""The scoring passes of a step, as the pass plan asks for them, and the gate's entropy."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

from asd_megatron.antisd import entropy_mask
from asd_megatron.distributed.layout import ProcessGroups
from asd_megatron.models.port import ModelPort
from asd_megatron.models.weight_copies import CopyName, WeightCopies
from asd_megatron.ops.quantile import lower_median
from asd_megatron.trainer.columns import Scores, TokenInputs
from asd_megatron.trainer.local_batch import LocalBatch
from asd_megatron.trainer.pass_plan import PassPlan
from asd_megatron.trainer.scorer import score
from asd_megatron.trainer.teacher_states import TeacherStates
from asd_megatron.trainer.token_method import Method


def score_teacher(
    port: ModelPort,
    process_groups: ProcessGroups,
    batch: LocalBatch,
    plan: PassPlan,
    *,
    temperature: float,
    states: TeacherStates | None = None,
    copies: WeightCopies | None = None,
) -> Scores | None:
    """Score the privileged sequences under the teacher's weights, and keep their hidden states in `states`; None when
    the plan has no such pass. `copies` has the copy that the plan names, which is in place only inside."""
    if not plan.teacher_scoring:
        return None
    keep = None if states is None else states.put
    packs, tokens = batch.teacher_packs(), batch.table.tokens
    with _in_place(copies, plan.teacher_copy):
        if states is not None and (plan.updates > 1 or plan.teacher_copy is not None):
            states.keep_head()
        return score(port, process_groups, packs, tokens, temperature=temperature, keep=keep)


def score_reference(
    port: ModelPort,
    process_groups: ProcessGroups,
    batch: LocalBatch,
    plan: PassPlan,
    *,
    temperature: float,
    copies: WeightCopies | None,
) -> Scores | None:
    """Score the student sequences under the initial weights, for the KL penalty; None when the plan has no such
    pass."""
    if not plan.reference_scoring:
        return None
    packs, tokens = batch.student_packs(), batch.table.tokens
    with _in_place(copies, "initial"):
        return score(port, process_groups, packs, tokens, temperature=temperature)


def _in_place(copies: WeightCopies | None, name: CopyName | None) -> AbstractContextManager[None]:
    if name is None:
        return nullcontext()
    if copies is None:
        raise ValueError(f"the plan scores under the copy of weights {name!r}, and no copies were given")
    return copies.in_place(name)


def score_student(
    port: ModelPort, process_groups: ProcessGroups, batch: LocalBatch, plan: PassPlan, *, temperature: float
) -> Scores | None:
    """Score the student before the first update; None when the update itself yields its scores."""
    if not plan.student_scoring:
        return None
    return score(port, process_groups, batch.student_packs(), batch.table.tokens, temperature=temperature)


def gate_entropy(
    process_groups: ProcessGroups, inputs: TokenInputs, method: Method, teacher: Scores | None, student: Scores | None
) -> float | None:
    """H of the gate (nats): the exact lower median of the entropy that the condition's gate reads, over the tokens of
    the global batch that `antisd.entropy_mask` counts.

    None when no token counts or the entropy was not scored. Collective over the data-parallel group.
    """
    scores = student if method.condition.gate_entropy == "student" else teacher
    if scores is None:
        return None
    counted = entropy_mask(method.condition, inputs.loss_mask, inputs.has_context)
    median = lower_median(scores.entropy[counted], process_groups.dp)
    return None if math.isnan(median) else median

"""The scoring passes of a step and the gate's entropy, as the pass plan asks for them."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from asd_megatron.antisd import entropy_mask
from asd_megatron.ops.quantile import lower_median
from asd_megatron.trainer.local_batch import LocalBatch
from asd_megatron.trainer.pass_plan import PassPlan
from asd_megatron.trainer.scorer import score
from asd_megatron.trainer.token_method import Columns, Method


def score_teacher(
    port: Any, process_groups: Any, batch: LocalBatch, plan: PassPlan, *, temperature: float
) -> dict[str, Tensor]:
    """`teacher_logprobs`, `teacher_entropy` [N] of the privileged sequences under the live weights ({} when the plan
    has no such pass)."""
    if not plan.teacher_scoring:
        return {}
    logprobs, entropy = score(port, process_groups, batch.teacher_packs(), batch.table.tokens, temperature=temperature)
    return {"teacher_logprobs": logprobs, "teacher_entropy": entropy}


def score_student(
    port: Any, process_groups: Any, batch: LocalBatch, plan: PassPlan, *, temperature: float
) -> dict[str, Tensor] | None:
    """`student_logprobs`, `student_entropy` [N] before the first update; None when the update itself supplies them."""
    if not plan.student_scoring:
        return None
    logprobs, entropy = score(port, process_groups, batch.student_packs(), batch.table.tokens, temperature=temperature)
    return {"student_logprobs": logprobs, "student_entropy": entropy}


def gate_entropy(
    process_groups: Any, inputs: Columns, method: Method, teacher: Columns, student: Columns | None
) -> float | None:
    """H: the exact lower median of the entropy that the condition's gate listens to, over the counting tokens of the
    global batch (nats). None when no token counts or nothing was scored. Collective over the data-parallel group."""
    listens_to_student = method.condition.gate_entropy == "student"
    entropy = (student or {}).get("student_entropy") if listens_to_student else teacher.get("teacher_entropy")
    if entropy is None:
        return None
    counts = entropy_mask(method.condition, inputs["loss_mask"], inputs["has_context"])
    median = lower_median(entropy[counts], process_groups.dp)
    return None if math.isnan(median) else median

"""What FP8 does to log-probs, u and entropies: the same few tokens of a batch scored in bfloat16 and in FP8.

u is a small difference of two large log-probs, and FP8 rounds each of them by itself: its noise is measured here on the
model being trained. The same passes say by how much a level that was measured in one number format (H_warm, the
perplexity's target, the deviation of u) has to be scaled for the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from asd_megatron.antisd import context_tokens, entropy_mask, signal
from asd_megatron.distributed.layout import ProcessGroups
from asd_megatron.models.port import ModelPort
from asd_megatron.models.weight_copies import WeightCopies
from asd_megatron.ops.quantile import lower_median
from asd_megatron.records import Example
from asd_megatron.trainer import passes, token_method
from asd_megatron.trainer.columns import Scores, TokenInputs
from asd_megatron.trainer.local_batch import LocalBatch
from asd_megatron.trainer.pass_plan import PassPlan
from asd_megatron.trainer.scorer import score
from asd_megatron.trainer.token_method import Method

BUDGET = 4096
"""Response tokens of a probe, over all ranks."""
LARGE_PMI = 0.05
"""Nats: the sign of a smaller |u| says nothing."""


@dataclass(frozen=True)
class Statistics:
    """What lambda is calibrated on, over the probe's tokens in one number format; None where nothing was scored or
    counts. Entropies: lower medians, nats. perplexity: mean over the responses. deviation: of u, nats."""

    student_entropy: float | None = None
    teacher_entropy: float | None = None
    perplexity: float | None = None
    deviation: float | None = None


@dataclass(frozen=True)
class Probe:
    """`metrics`: see `observe/names.py`; NaN where no token counts, and without the teacher's in a recipe that does
    not score it. `tokens`: of the student's loss, over all ranks."""

    metrics: dict[str, float]
    bfloat16: Statistics
    fp8: Statistics
    tokens: int


def probe(
    port: ModelPort,
    process_groups: ProcessGroups,
    few: LocalBatch,
    method: Method,
    plan: PassPlan,
    *,
    temperature: float,
    copies: WeightCopies | None = None,
) -> Probe:
    """Score `first_examples` of a batch in both formats, the teacher under the weights that the plan says. Collective
    over all ranks; the same on every rank."""
    inputs = token_method.token_inputs(few, method)
    where, tokens = (port, process_groups), few.table.tokens

    def scored(fp8: bool) -> tuple[Scores, Scores | None]:
        student = score(*where, few.student_packs(), tokens, temperature=temperature, fp8=fp8)
        if not plan.teacher_scoring:
            return student, None
        with passes.in_place(copies, plan.teacher_copy):
            return student, score(*where, few.teacher_packs(), tokens, temperature=temperature, fp8=fp8)

    bfloat16, fp8 = scored(False), scored(True)
    statistics = _statistics(process_groups, few, inputs, method, *bfloat16)
    fp8_statistics = _statistics(process_groups, few, inputs, method, *fp8)
    metrics = _metrics(process_groups, inputs, bfloat16, fp8, statistics, fp8_statistics)
    return Probe(metrics, statistics, fp8_statistics, few.counts(0).tokens)


def first_examples(examples: Sequence[Example], budget: int = BUDGET, *, with_context: bool) -> list[Example]:
    """The first examples, those `with_context` alone if there are any, of `budget` response tokens in all; of the last
    one the beginning of its response. A function of the global batch: the same in every layout."""
    chosen, left = [], budget
    candidates = [e for e in examples if e.has_context] if with_context else []
    for example in candidates or examples:
        if left <= 0:
            break
        chosen.append(_cut(example, left))
        left -= len(chosen[-1].rollout.response_ids)
    return chosen


def _cut(example: Example, tokens: int) -> Example:
    r = example.rollout
    if len(r.response_ids) <= tokens:
        return example
    cut = replace(
        r,
        response_ids=r.response_ids[:tokens],
        logprobs=r.logprobs[:tokens],
        loss_mask=r.loss_mask[:tokens],
        routed_experts=None,
    )
    return replace(example, rollout=cut)


def sign_flips(u: Tensor, reference: Tensor) -> tuple[int, int]:
    """(tokens whose u has another sign than `reference`, tokens looked at: those where that is above `LARGE_PMI`)."""
    large = reference.abs() > LARGE_PMI
    return int(((u > 0) != (reference > 0))[large].sum()), int(large.sum())


def _statistics(
    process_groups: ProcessGroups,
    batch: LocalBatch,
    inputs: TokenInputs,
    method: Method,
    student: Scores,
    teacher: Scores | None,
) -> Statistics:
    counted = context_tokens(inputs.loss_mask, inputs.has_context)
    by_gate = entropy_mask(method.condition, inputs.loss_mask, inputs.has_context)
    perplexity = entropy = None
    if teacher is not None:
        entropy = _number(lower_median(teacher.entropy[counted], process_groups.dp))
        perplexity = _number(float(passes.teacher_perplexities(process_groups, batch, inputs, teacher).nanmean()))
    deviation = None
    if method.condition.u_source == "student" or teacher is not None:
        logprobs = None if teacher is None else teacher.logprobs
        u = signal(method.condition, student.logprobs, logprobs, inputs.has_context)
        deviation = passes.pmi_deviation(process_groups, inputs, u)
    return Statistics(
        _number(lower_median(student.entropy[by_gate], process_groups.dp)), entropy, perplexity, deviation
    )


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _metrics(
    process_groups: ProcessGroups,
    inputs: TokenInputs,
    bfloat16: tuple[Scores, Scores | None],
    fp8: tuple[Scores, Scores | None],
    statistics: Statistics,
    fp8_statistics: Statistics,
) -> dict[str, float]:
    """Sums over the data-parallel ranks, then fractions of them."""
    (s, t), (s8, t8) = bfloat16, fp8
    counted = inputs.loss_mask if t is None else context_tokens(inputs.loss_mask, inputs.has_context)
    sums = [counted.double().sum(), _distance(s8.logprobs, s.logprobs, counted)]
    if t is not None and t8 is not None:
        u, u8 = ((b.logprobs - a.logprobs)[counted] for a, b in ((s, t), (s8, t8)))
        flips = sign_flips(u8, u)
        sums += [_distance(t8.logprobs, t.logprobs, counted), (u8.double() - u.double()).abs().sum()]
        sums += [torch.tensor(float(n), dtype=torch.float64, device=counted.device) for n in flips]
    total = passes.sum_over(process_groups.dp, torch.stack(sums).cpu(), inputs.weight.device).tolist()
    tokens, student, *rest = total
    found = {"fp8/student_drift": _ratio(student, tokens)}
    if rest:
        teacher, pmi, flipped, large = rest
        found["fp8/teacher_drift"] = _ratio(teacher, tokens)
        found["fp8/pmi_drift"] = _ratio(pmi, tokens)
        found["fp8/pmi_sign_flips"] = _ratio(flipped, large)
        before, after = statistics.teacher_entropy, fp8_statistics.teacher_entropy
        found["fp8/entropy_shift"] = math.nan if not before or after is None else after / before - 1
    return found


def _distance(a: Tensor, b: Tensor, counted: Tensor) -> Tensor:
    return (a.double() - b.double()).abs()[counted].sum()


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.nan

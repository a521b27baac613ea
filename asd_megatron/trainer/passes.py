"""The scoring passes of a step, as the pass plan asks for them, and the statistics that lambda and the outlier rule
read: the gate's entropy, the teacher's perplexities, the deviation of u."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor

from asd_megatron.antisd import context_tokens, entropy_mask, moments, response_perplexities, term_statistics
from asd_megatron.antisd.normalization import STD_FLOOR
from asd_megatron.distributed.layout import ProcessGroups
from asd_megatron.models.port import ModelPort
from asd_megatron.models.weight_copies import CopyName, WeightCopies
from asd_megatron.ops.quantile import lower_median
from asd_megatron.trainer.columns import Scores, TokenInputs
from asd_megatron.trainer.expert_routing import StudentRouting
from asd_megatron.trainer.local_batch import LocalBatch
from asd_megatron.trainer.pass_plan import PassPlan
from asd_megatron.trainer.schedule import Routing
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
    with in_place(copies, plan.teacher_copy):
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
    with in_place(copies, "initial"):
        return _score_student(port, process_groups, batch, temperature=temperature, fp8=plan.fp8 == "all")


def _score_student(
    port: ModelPort,
    process_groups: ProcessGroups,
    batch: LocalBatch,
    *,
    temperature: float,
    routing: Routing | None = None,
    fp8: bool,
) -> Scores:
    """Score the student sequences under the live weights. Scores in FP8, which log-probs of the update are compared
    with, are made in the updates' own packs: with one scale for all tokens of a pack, others would round
    differently."""
    packs = batch.update_packs() if fp8 else batch.student_packs()
    return score(port, process_groups, packs, batch.table.tokens, temperature=temperature, routing=routing, fp8=fp8)


def in_place(copies: WeightCopies | None, name: CopyName | None) -> AbstractContextManager[None]:
    """Inside, the copy `name` of the weights is live; None: the live weights stay."""
    if name is None:
        return nullcontext()
    if copies is None:
        raise ValueError(f"the plan scores under the copy of weights {name!r}, and no copies were given")
    return copies.in_place(name)


def score_student(
    port: ModelPort,
    process_groups: ProcessGroups,
    batch: LocalBatch,
    plan: PassPlan,
    *,
    temperature: float,
    routing: StudentRouting | None = None,
) -> Scores | None:
    """Score the student before the first update; None when the update itself yields its scores. `routing`: of a model
    with experts, which may record the experts for the updates. Scores that the policy ratio divides by, of a model that
    trains in FP8, are FP8's."""
    if not plan.student_scoring:
        return None
    fp8 = plan.fp8 != "none" and not plan.bfloat16_student
    pack_routing = None if routing is None else routing.scoring
    scores = _score_student(port, process_groups, batch, temperature=temperature, routing=pack_routing, fp8=fp8)
    if routing is not None:
        routing.share()
    return scores


def score_old(
    port: ModelPort,
    process_groups: ProcessGroups,
    batch: LocalBatch,
    plan: PassPlan,
    *,
    temperature: float,
    routing: StudentRouting | None = None,
) -> Tensor | None:
    """The old log-probs [N] of the policy ratios, as the updates compute them, before the first; None when the plan has
    no such pass. `routing`: of a model with experts, after the student's scoring pass."""
    if not plan.old_scoring:
        return None
    pack_routing = None if routing is None else routing.replayed
    return _score_student(port, process_groups, batch, temperature=temperature, routing=pack_routing, fp8=True).logprobs


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


def teacher_perplexities(
    process_groups: ProcessGroups, batch: LocalBatch, inputs: TokenInputs, teacher: Scores
) -> Tensor:
    """The teacher's perplexity of every response of the global batch, in the order of its examples: float64 [R]
    on the CPU, the same on every rank; NaN without context and where the loss sees no token.

    Each data-parallel rank contributes its own responses and zeros elsewhere: the sum is exact, so that statistics of
    the result depend on no layout. Collective over the data-parallel group.
    """
    counted = context_tokens(inputs.loss_mask, inputs.has_context)
    # On the CPU index_add_ adds in a fixed order: ranks with the same columns get the same bits.
    own = response_perplexities(teacher.logprobs.cpu(), counted.cpu(), inputs.segment.cpu(), batch.table.rollouts)
    found = torch.zeros(batch.total, dtype=torch.float64)
    found[batch.indices] = own
    return sum_over(process_groups.dp, found, inputs.weight.device)


def per_token(batch: LocalBatch, values: Tensor) -> Tensor:
    """Each response's value, of the global batch's [R], at every one of its tokens on this rank: float32 [N]."""
    own = batch.table.spread(values[batch.indices])
    return own.to(batch.layout.device, torch.float32)


def pmi_deviation(process_groups: ProcessGroups, inputs: TokenInputs, pmi: Tensor) -> float | None:
    """The standard deviation of u (nats) over the tokens of the global batch that carry a term; None where all have the
    same u: an outlier limit from that would leave no term at all. Collective over the data-parallel group; the same on
    every rank."""
    dp = process_groups.dp
    parts = torch.zeros(dp.size(), 3, dtype=torch.float64)
    parts[dp.rank()] = term_statistics(pmi.cpu(), inputs.term_mask.cpu())[0]
    total = sum_over(dp, parts, inputs.weight.device).sum(0, keepdim=True)
    deviation = float(moments(total)[1])
    return deviation if deviation > STD_FLOOR else None


def sum_over(group: dist.ProcessGroup, values: Tensor, device: torch.device) -> Tensor:
    """`values` (CPU) summed over the ranks of `group`, on the CPU; the collective runs on `device`."""
    if group.size() == 1:
        return values
    values = values.to(device)
    dist.all_reduce(values, group=group)
    return values.cpu()

"""Which forward and backward passes one step of a recipe needs, and why. A pure function of the recipe's values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from asd_megatron.antisd.divergence import Condition, resolve_condition
from asd_megatron.antisd.importance import Level
from asd_megatron.antisd.policy_loss import PolicyLoss
from asd_megatron.errors import plural
from asd_megatron.models.weight_copies import CopyName

BACKWARD_COST = 2  # a backward pass in forwards
NORMALIZATIONS = ("none", "sequence", "demean", "batch")
TEACHER_COPIES: dict[CopyName, str] = {
    "initial": "under a copy of the initial weights",
    "ema": "under the moving average of the weights",
}
REFERENCE_REASON = (
    "reference scoring pass: the KL penalty needs the sampled tokens' log-probs under the initial weights, exchanged in"
    " place with the live ones (1 forward)"
)

Head = Literal["fused", "two_phase", "exact"]
Fp8 = Literal["none", "update", "all"]
"""Which passes compute in FP8: the update alone, with scores in bfloat16, or scoring passes too."""
FP8_SPEEDUP = 1.4
"""Of a pass in FP8 over one in bfloat16: an assumption, for the costs that the start-up report prints."""


@dataclass(frozen=True)
class PassPlan:
    """The passes of one step.

    Attributes:
        student_scoring: a forward pass over the batch's student sequences, before the update.
        teacher_scoring: a forward pass over the privileged sequences, before the update.
        head: of the update (T tokens, H hidden size, V vocabulary). "fused": logits, loss and gradient of a tile at
            once, 6 T H V flops. "two_phase": log-probs first, the backward pass recomputes the logits, 8 T H V flops.
            "exact": as "fused" with the teacher's logits beside the student's, 8 T H V flops.
        updates: optimizer steps of the batch.
        forwards_per_step: cost of the step in forward passes over the batch; a backward pass counts as two.
        cost: the same in bfloat16 forwards: one in FP8 counts as 1 / `FP8_SPEEDUP`.
        reasons: one sentence for each decision, for the start-up report.
        teacher_copy: the copy of weights that the teacher is scored with; None: the live weights.
        reference_scoring: a forward pass over the batch's student sequences under the initial weights, before the
            update.
        fp8: which passes compute in FP8.
        bfloat16_student: the updates compute in FP8 and the student's scoring pass in bfloat16. u, the importance
            weights and the KL penalty take their log-probs from the latter; the policy ratio stays within FP8, or
            rounding would look like a change of the policy and be clipped. Its old log-probs are those of the first
            update itself, or, with several mini-batches, of `old_scoring`.
        old_scoring: a forward pass in FP8 over the updates' own packs, before the first one, for these log-probs.
    """

    student_scoring: bool
    teacher_scoring: bool
    head: Head
    updates: int
    forwards_per_step: int
    cost: float
    reasons: tuple[str, ...]
    teacher_copy: CopyName | None = None
    reference_scoring: bool = False
    fp8: Fp8 = "none"
    bfloat16_student: bool = False
    old_scoring: bool = False

    @property
    def student_forwards(self) -> int:
        """Of `forwards_per_step` those over the student's sequences."""
        return self.forwards_per_step - self.teacher_scoring


def plan_passes(
    condition: Condition | str,
    updates: int = 1,
    term_normalization: str = "none",
    *,
    epochs: int = 1,
    log_pmi: bool = False,
    importance: bool = False,
    importance_level: Level = "token",
    exact: bool = False,
    perplexity: bool = False,
    teacher_copy: CopyName | None = None,
    kl_penalty: bool = False,
    fp8: Fp8 = "none",
    policy_loss: PolicyLoss = "ppo_clip",
) -> PassPlan:
    """Derive the passes from the recipe.

    Args:
        condition: `algorithm.name`, or what it stands for. updates: mini-batches of a batch. epochs: passes over them.
        term_normalization: one of `NORMALIZATIONS`. log_pmi: score the teacher even if only the log needs it.
        importance: rollouts get importance weights against their engine's log-probs. importance_level: of these;
            "token" without them. exact: the per-token term is the divergence over the whole vocabulary. perplexity:
            lambda comes from the teacher's perplexity.
        teacher_copy: the copy of weights that scores the teacher; None: the live ones. kl_penalty: the loss or the
            advantage needs the sampled tokens' log-probs under the initial weights. fp8: which passes compute in FP8.
        policy_loss: with several updates `gspo` needs the ratio of a complete response before the loss of its tokens.

    Raises ValueError for values outside these; for the exact divergence of an update in FP8 from a teacher in bfloat16
    (D would measure the rounding too, which is no difference between student and teacher); and for the exact
    divergence with `gspo` and several updates, since the exact head goes through the logits once.
    """
    c = resolve_condition(condition)
    if updates < 1 or epochs < 1:
        raise ValueError(f"updates_per_batch {updates} and epochs {epochs} must be at least 1")
    if term_normalization not in NORMALIZATIONS:
        raise ValueError(
            f"term_normalization {term_normalization!r} does not exist; choose one of {', '.join(NORMALIZATIONS)}"
        )
    if exact and fp8 == "update":
        raise ValueError("the exact divergence needs student and teacher in one number format: fp8 none or all")
    by_response = policy_loss == "gspo" and updates * epochs > 1
    if exact and by_response:
        raise ValueError(
            "the exact divergence knows no response's ratio before its loss: gspo takes one update a batch"
        )
    normalization = term_normalization if c.sign else "none"  # without a term in the loss there is nothing to scale
    steps = updates * epochs
    teacher = c.uses_teacher or log_pmi
    copy = teacher_copy if teacher else None
    causes = _student_causes(c, steps, normalization, importance_level, exact)
    read = _read_of_student(c, teacher=teacher, importance=importance, kl_penalty=kl_penalty)
    bfloat16_student = fp8 == "update" and bool(read)
    student, old = bool(causes) or bfloat16_student, bfloat16_student and updates > 1
    head, head_reason = _head(
        steps, normalization, importance_level, exact=exact, student=student, copy=copy, by_response=by_response
    )
    passes = int(student) + old + teacher + kl_penalty
    update_cost = (1 + BACKWARD_COST) * epochs
    in_bfloat16 = {"none": update_cost + passes, "update": teacher + kl_penalty + bfloat16_student, "all": 0}[fp8]
    cost = in_bfloat16 + (update_cost + passes - in_bfloat16) / FP8_SPEEDUP
    reasons = [_teacher_reason(c, exact=exact, log_pmi=log_pmi, perplexity=perplexity)]
    if copy is not None:
        reasons.append(f"the teacher is scored {TEACHER_COPIES[copy]}: exchanged in place with the live ones, and back")
    reasons.append(_student_reason(causes, read if bfloat16_student else []))
    if bfloat16_student:
        reasons.append(_old_reason(updates, epochs))
    reasons.append(head_reason)
    if kl_penalty:
        reasons.append(REFERENCE_REASON)
    reasons.append(_update_reason(steps, epochs, update_cost, passes))
    if fp8 != "none":
        reasons.append(_fp8_reason(cost, update_cost + bool(causes) + teacher + kl_penalty))
    return PassPlan(
        student_scoring=student,
        teacher_scoring=teacher,
        head=head,
        updates=steps,
        forwards_per_step=update_cost + passes,
        cost=cost,
        reasons=tuple(reasons),
        teacher_copy=copy,
        reference_scoring=kl_penalty,
        fp8=fp8,
        bfloat16_student=bfloat16_student,
        old_scoring=old,
    )


def _teacher_reason(c: Condition, *, exact: bool, log_pmi: bool, perplexity: bool) -> str:
    """Why the teacher is scored, or is not."""
    if c.uses_teacher:
        needs = "D needs its hidden states" if exact else "u = t - s needs its log-probs"
        if c.gated and c.gate_entropy == "teacher":
            needs += ", the gate its entropy"
        elif perplexity:
            needs += ", lambda its perplexity"
        return f"teacher scoring pass: {needs} before the update (1 forward)"
    if log_pmi:
        return f"teacher scoring pass: only to log u (log_pmi), {c.name} does not use it (1 forward)"
    return f"no teacher pass: {c.name} uses no privileged context"


def _student_causes(c: Condition, updates: int, normalization: str, level: Level, exact: bool) -> list[str]:
    """Why the student is scored before the update; none: it is not."""
    causes = []
    if updates > 1:
        causes.append(f"{updates} updates a batch share the log-probs, u and lambda from before the first")
    if c.gated and c.gate_entropy == "student":
        causes.append("the gate reads the student's entropy, so lambda must be known before the update")
    if normalization == "batch":
        causes.append("term_normalization batch needs every token's term before any token's loss")
    if exact and level != "token":
        causes.append(f"importance_level {level} needs a rollout's log-probs before its loss")
    return causes


def _read_of_student(c: Condition, *, teacher: bool, importance: bool, kl_penalty: bool) -> list[str]:
    """What reads the student's log-probs beside those of other passes or of the engine; the policy ratio aside."""
    found = []
    if c.sign or teacher:
        found.append("u" if c.sign else "the log of u")
    if importance:
        found.append("the importance correction")
    if kl_penalty:
        found.append("the KL penalty")
    return found


def _student_reason(causes: Sequence[str], read: Sequence[str]) -> str:
    """Why the student is scored, or is not. read: what reads bfloat16 scores beside an update in FP8."""
    if read:
        verb = "read" if len(read) > 1 else "reads"
        causes = [*causes, f"the update computes in FP8, and {' and '.join(read)} {verb} bfloat16 log-probs"]
    if causes:
        return f"student scoring pass: {'; '.join(causes)} (1 forward)"
    return "no student scoring pass: with one update a batch its own log-probs are the old ones"


def _old_reason(updates: int, epochs: int) -> str:
    """Where the policy ratio's old log-probs come from when those of the scoring pass are bfloat16's."""
    if updates > 1:
        return (
            f"another student scoring pass, in FP8: the ratios of {updates} mini-batches divide by log-probs of the"
            " updates' own number format, from before the first (1 forward)"
        )
    first = "the first epoch's" if epochs > 1 else "the update's"
    return f"no pass for the ratio's old log-probs: they are {first} own, in FP8"


def _head(
    updates: int,
    normalization: str,
    level: Level,
    *,
    exact: bool,
    student: bool,
    copy: CopyName | None,
    by_response: bool,
) -> tuple[Head, str]:
    """The head of the update and why. `student`: the plan has a scoring pass of the student. `by_response`: the policy
    ratio is that of the response, and not 1."""
    if exact:
        keeps = ""
        if copy is not None:
            keeps = "; as the teacher's weights are not the live ones a copy of the head too"
        elif updates > 1:
            keeps = "; with several updates a copy of the head too"
        return "exact", (
            "exact head (8 T H V): logits of student and teacher together; the teacher's hidden states of the response"
            f" tokens are kept from its scoring pass until the update{keeps}"
        )
    if by_response:
        return "two_phase", (
            "two-phase head (8 T H V): policy_loss gspo needs a response's log-probs under the present weights before"
            " its loss, in every update after the first"
        )
    if student:
        known = "advantages" if level == "token" else "advantages and importance weights"
        return "fused", f"fused head (6 T H V): {known} are known before the update"
    over_rollouts = [f"term_normalization {normalization}"] if normalization in ("sequence", "demean") else []
    over_rollouts += [f"importance_level {level}"] if level != "token" else []
    if over_rollouts:
        need = "needs" if len(over_rollouts) == 1 else "need"
        return "two_phase", (
            f"two-phase head (8 T H V): {' and '.join(over_rollouts)} {need} a rollout's log-probs before its loss"
        )
    return "fused", "fused head (6 T H V): every token's weight depends on that token alone"


def _update_reason(steps: int, epochs: int, cost: int, passes: int) -> str:
    """What the updates cost in forwards, and with the scoring `passes` the step."""
    over = f" over {epochs} epochs" if epochs > 1 else ""
    return f"{plural(steps, 'update')}{over}: {cost} forwards' worth; {cost + passes} a step in all"


def _fp8_reason(cost: float, without_fp8: int) -> str:
    """What FP8 saves. without_fp8: the step's forwards if every pass computed in bfloat16."""
    return (
        f"worth {cost:.1f} bfloat16 forwards, if a pass in FP8 is {FP8_SPEEDUP} times as fast (an assumption):"
        f" {without_fp8:.1f} without FP8, {without_fp8 / FP8_SPEEDUP:.1f} with every pass in FP8"
    )

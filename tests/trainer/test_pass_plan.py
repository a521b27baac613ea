"""Which passes a recipe needs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from asd_megatron.antisd import CONDITIONS, condition
from asd_megatron.antisd.importance import Level
from asd_megatron.trainer.pass_plan import plan_passes

TEACHER = [c.name for c in CONDITIONS.values() if c.uses_teacher]


@pytest.mark.parametrize(
    ("name", "student", "teacher", "forwards"),
    [
        ("grpo", False, False, 3),
        ("sd", False, True, 4),
        ("antisd", False, True, 4),
        ("reverse_kl_ascent", False, True, 4),
        ("no_gate", False, True, 4),
        ("multiplicative", False, True, 4),
        ("student_entropy_gate", True, True, 5),
        ("no_teacher", True, False, 4),
    ],
)
def test_one_update(name: str, student: bool, teacher: bool, forwards: int) -> None:
    p = plan_passes(condition(name))
    assert (p.student_scoring, p.teacher_scoring, p.forwards_per_step) == (student, teacher, forwards)
    assert p.head == "fused" and p.updates == 1
    assert plan_passes(name) == p


@pytest.mark.parametrize("name", list(CONDITIONS))
def test_several_updates_score_the_student_first(name: str) -> None:
    p = plan_passes(name, updates=4)
    assert p.student_scoring and p.head == "fused" and p.updates == 4
    assert p.forwards_per_step == 4 + (name in TEACHER)
    twice = plan_passes(name, updates=2, epochs=2)
    assert twice.student_scoring and twice.updates == 4
    assert twice.forwards_per_step == 7 + (name in TEACHER)


def test_term_normalization() -> None:
    sequence = plan_passes("antisd", term_normalization="sequence")
    assert not sequence.student_scoring and sequence.head == "two_phase"
    assert plan_passes("antisd", term_normalization="demean").head == "two_phase"
    assert not sequence.student_scoring and "lambda its perplexity" in "".join(
        plan_passes(replace(condition("antisd"), gated=False), perplexity=True).reasons
    )
    batch = plan_passes("antisd", term_normalization="batch")
    assert batch.student_scoring and batch.head == "fused" and batch.forwards_per_step == 5
    assert plan_passes("antisd", 2, "sequence").head == "fused"  # advantages are known from the scoring passes
    assert plan_passes("student_entropy_gate", term_normalization="sequence").head == "fused"
    for mode in ("sequence", "batch"):  # grpo has no term to scale
        p = plan_passes("grpo", term_normalization=mode, log_pmi=True)
        assert not p.student_scoring and p.head == "fused"


def test_the_exact_estimator() -> None:
    p = plan_passes("antisd", exact=True)
    assert p.head == "exact" and p.teacher_scoring and not p.student_scoring and p.forwards_per_step == 4
    assert plan_passes("antisd", 2, exact=True).student_scoring
    assert plan_passes("antisd", exact=True, importance_level="sequence").student_scoring


@pytest.mark.parametrize("level", ["sequence", "geometric"])
def test_importance_of_whole_responses(level: Level) -> None:
    """A response's log-probs are needed before its loss: from the first phase of the head, or a scoring pass."""
    for name in CONDITIONS:
        p = plan_passes(name, importance_level=level)
        assert p.head == ("fused" if p.student_scoring else "two_phase")
        assert p.forwards_per_step == plan_passes(name).forwards_per_step
    several = plan_passes("antisd", 2, importance_level=level)
    assert several.student_scoring and several.head == "fused"
    assert plan_passes("antisd", term_normalization="batch", importance_level=level).head == "fused"
    assert plan_passes("antisd", importance_level="token") == plan_passes("antisd")


def test_log_pmi_scores_the_teacher_for_the_log_only() -> None:
    p = plan_passes("grpo", log_pmi=True)
    assert p.teacher_scoring and p.forwards_per_step == 4
    assert any("only to log u" in r for r in p.reasons)
    assert plan_passes("antisd", log_pmi=True) == plan_passes("antisd")


def test_other_weights_for_the_teacher_add_no_pass() -> None:
    for name in TEACHER:
        p = plan_passes(name, teacher_copy="ema")
        assert p.teacher_copy == "ema" and p.forwards_per_step == plan_passes(name).forwards_per_step
        assert any("moving average" in reason for reason in p.reasons)
    assert plan_passes("grpo", teacher_copy="initial").teacher_copy is None  # nothing scores with it
    assert "a copy of the head" in "".join(plan_passes("antisd", exact=True, teacher_copy="initial").reasons)
    assert (
        plan_passes("antisd", exact=True).reasons[0].startswith("teacher scoring pass: D needs its hidden states, the")
    )
    assert "a copy of the head" not in "".join(plan_passes("antisd", exact=True).reasons)


@pytest.mark.parametrize("name", list(CONDITIONS))
def test_a_kl_penalty_adds_a_pass(name: str) -> None:
    p = plan_passes(name, kl_penalty=True)
    assert p.reference_scoring and p.forwards_per_step == plan_passes(name).forwards_per_step + 1
    assert any("initial weights" in reason and "(1 forward)" in reason for reason in p.reasons)
    assert not plan_passes(name).reference_scoring


@pytest.mark.parametrize(
    ("name", "options", "without", "update", "everywhere"),
    [
        ("antisd", {}, 4, 4.14, 2.86),  # nothing is won: the student's pass costs what FP8 saves
        ("antisd", {"epochs": 4}, 14, 10.57, 10),  # the ratio's old log-probs are the first epoch's own
        ("antisd", {"updates": 4}, 5, 4.86, 3.57),  # of several mini-batches they take another pass, in FP8
        ("grpo", {}, 3, 2.14, 2.14),
        ("grpo", {"updates": 4}, 4, 2.86, 2.86),
        ("grpo", {"importance": True}, 3, 3.14, 2.14),
        ("grpo", {"kl_penalty": True}, 4, 4.14, 2.86),
        ("grpo", {"log_pmi": True}, 4, 4.14, 2.86),
        ("no_teacher", {}, 4, 3.14, 2.86),
    ],
)
def test_costs_of_fp8(name: str, options: dict[str, Any], without: float, update: float, everywhere: float) -> None:
    bf16, clean, scored = (plan_passes(name, **options, fp8=fp8) for fp8 in ("none", "update", "all"))
    assert (bf16.cost, clean.cost, scored.cost) == pytest.approx((without, update, everywhere), abs=0.005)
    assert bf16.forwards_per_step == bf16.cost == scored.forwards_per_step
    told = clean.reasons[-1]
    assert f"{update:.1f} bfloat16 forwards" in told and "assumption" in told and f"{without:.1f} without" in told
    assert not any("FP8" in reason for reason in bf16.reasons)


def test_which_scores_are_bfloat16() -> None:
    """Those that are compared with others; GRPO's are compared with nothing, and its ratio stays within FP8."""
    for c in CONDITIONS.values():
        p = plan_passes(c, fp8="update")
        assert p.bfloat16_student == p.student_scoring == (c.name != "grpo") and not p.old_scoring
        several = plan_passes(c, 3, fp8="update")
        assert several.student_scoring and several.bfloat16_student == several.old_scoring == (c.name != "grpo")
        for fp8 in ("none", "all"):
            other = plan_passes(c, 3, fp8=fp8)  # type: ignore[arg-type]
            assert not (other.bfloat16_student or other.old_scoring)
            assert other.forwards_per_step == plan_passes(c, 3).forwards_per_step
    assert plan_passes("antisd", term_normalization="sequence", fp8="update").head == "fused"
    told = plan_passes("antisd", importance=True, kl_penalty=True, fp8="update").reasons
    assert any("u and the importance correction and the KL penalty read bfloat16" in reason for reason in told)


def test_the_ratio_of_a_response_takes_the_two_phase_head() -> None:
    """In later updates than the first; not for one update, whose ratios are 1."""
    for options in ({"updates": 2}, {"epochs": 2}):
        several = plan_passes("antisd", **options, policy_loss="gspo")  # type: ignore[arg-type]
        assert several.head == "two_phase" and "policy_loss gspo" in "".join(several.reasons)
        assert several.forwards_per_step == plan_passes("antisd", **options).forwards_per_step  # type: ignore[arg-type]
        assert plan_passes("antisd", **options, policy_loss="cispo").head == "fused"  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="gspo takes one update"):
            plan_passes("antisd", **options, policy_loss="gspo", exact=True)  # type: ignore[arg-type]
    assert plan_passes("antisd", policy_loss="gspo").head == "fused"
    assert plan_passes("antisd", policy_loss="gspo", exact=True).head == "exact"


def test_the_exact_divergence_is_of_one_number_format() -> None:
    assert plan_passes("antisd", exact=True, fp8="all").head == "exact"
    with pytest.raises(ValueError, match="one number format"):
        plan_passes("antisd", exact=True, fp8="update")


def test_reasons_name_what_decided() -> None:
    def told(*args: object, **options: object) -> str:
        return "\n".join(plan_passes(*args, **options).reasons)  # type: ignore[arg-type]

    assert "the gate its entropy" in told("antisd")
    assert "the gate" not in told("sd")
    assert "no teacher pass: grpo" in told("grpo")
    assert "4 updates a batch share" in told("antisd", updates=4)
    assert "the gate reads the student's entropy" in told("no_teacher")
    assert "term_normalization batch" in told("antisd", term_normalization="batch")
    assert "two-phase head" in told("antisd", term_normalization="sequence")
    assert "4 a step in all" in told("antisd")
    assert "importance_level geometric needs a rollout's log-probs" in told("grpo", importance_level="geometric")
    both = told("antisd", term_normalization="sequence", importance_level="sequence")
    assert "term_normalization sequence and importance_level sequence need a rollout's log-probs" in both
    assert "advantages and importance weights are known" in told("antisd", 2, importance_level="sequence")
    assert "importance" not in told("antisd", 2)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        plan_passes("antisd", updates=0)
    with pytest.raises(ValueError, match="none, sequence, demean, batch"):
        plan_passes("antisd", term_normalization="tokens")

"""What sets lambda and the outlier limit of a run, made from recipes, and its state over changes of the recipe."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from asd_megatron.antisd import response_perplexities
from asd_megatron.config import make_recipe
from asd_megatron.models.precision import ScoreFormats
from asd_megatron.run.method import make_strength, never_acts
from asd_megatron.run.strength import TermStrength
from asd_megatron.trainer import passes
from asd_megatron.trainer.fp8_probe import Probe, Statistics

MINIMAL: dict[str, Any] = {"model": {"path": "model"}, "data": {"train": "problems.jsonl"}}
ALONE: Any = SimpleNamespace(dp=SimpleNamespace(size=lambda: 1, rank=lambda: 0))
BY_PERPLEXITY = "algorithm.lambda_source=teacher_perplexity"


def strength(text: str) -> TermStrength:
    return make_strength(make_recipe(MINIMAL, [f"--{pair}" for pair in text.split()]), ALONE)


def state_of(s: TermStrength) -> dict[str, Any]:
    return json.loads(json.dumps(s.state_dict()))


def test_the_recipe_becomes_the_rule() -> None:
    made = strength(
        f"{BY_PERPLEXITY} algorithm.lambda_max=0.4 algorithm.outlier_deviations=2 perplexity.target_ratio=0.9"
        " perplexity.cutoff=2.5 perplexity.scope=batch perplexity.shift=negative perplexity.warmup_steps=3"
    )
    assert made.perplexity is not None and made.outliers is not None
    rule = made.perplexity.rule
    assert (rule.lambda_max, rule.target_ratio, rule.cutoff, rule.scope, rule.shift) == (
        0.4,
        0.9,
        2.5,
        "batch",
        "negative",
    )
    assert made.perplexity.warmup_steps == made.outliers.warmup_steps == 3 and made.outliers.deviations == 2
    assert not made.method.condition.gated and not made.gate.gated
    assert strength("algorithm.outlier_deviations=2 gate.warmup_steps=4").outliers.warmup_steps == 4  # type: ignore[union-attr]
    for plain in ("algorithm.name=antisd", f"algorithm.name=grpo {BY_PERPLEXITY}"):  # a baseline is one line away
        assert strength(plain).perplexity is None and strength(plain).outliers is None


def test_a_resumed_run_goes_on_with_its_own_state_and_another_source_of_lambda_warms_up() -> None:
    gate, perplexity = strength("algorithm.outlier_deviations=2"), strength(BY_PERPLEXITY)
    for _ in range(5):
        gate.gate.update(0.7)
        assert gate.outliers is not None and perplexity.perplexity is not None
        gate.outliers.record(1.5)
        perplexity.perplexity.update(torch.tensor([1.5, 1.7]))
    same, other = (
        strength("algorithm.outlier_deviations=2"),
        strength(f"{BY_PERPLEXITY} algorithm.outlier_deviations=2"),
    )
    same.load_state_dict(state_of(gate), of="antisd")
    assert state_of(same) == state_of(gate) and same.gate.h_warm == 0.7
    other.load_state_dict(state_of(gate), of="antisd")
    assert other.perplexity is not None and other.perplexity.target is None and other.perplexity.warming_up
    assert other.outliers is not None and other.outliers.limit == 3.0  # u is the same in both
    back = strength("algorithm.name=antisd")
    back.load_state_dict(state_of(perplexity), of="antisd")
    assert back.gate.h_warm is None and back.gate.warming_up
    older = {"gate": state_of(gate)["gate"]}  # a checkpoint of before there were others
    other.load_state_dict(older, of="antisd")


@pytest.mark.parametrize("warmup_steps", [0, 2])
def test_a_level_that_the_recipe_gives_no_more_is_measured(warmup_steps: int) -> None:
    """In the warm-up that the saved run made beside it, otherwise in one after the checkpoint; and the run says so."""
    common = f"gate.warmup_steps={warmup_steps} gate.h_warm=0.7"
    given = {"gate": strength(common), "perplexity": strength(_by_perplexity(f"{warmup_steps} perplexity.target=1.2"))}
    for _ in range(2):
        given["gate"].gate.update(0.5)
        assert given["perplexity"].perplexity is not None
        given["perplexity"].perplexity.update(torch.tensor([1.5]))
    kept = strength(common)
    assert kept.load_state_dict(state_of(given["gate"]), of="antisd") == [] and kept.gate.h_warm == 0.7

    steps = warmup_steps or 3
    gate, other = strength(f"gate.warmup_steps={steps}"), strength(_by_perplexity(f"{steps}"))
    assert other.perplexity is not None
    said = gate.load_state_dict(state_of(given["gate"]), of="antisd")
    said += other.load_state_dict(state_of(given["perplexity"]), of="antisd")
    assert [line.partition(" ")[0] for line in said] == ["gate.h_warm", "perplexity.target"]
    if warmup_steps:
        assert (gate.gate.h_warm, other.perplexity.target) == (0.5, 1.5 - 0.1)
        return
    assert all("3 warm-up steps" in line for line in said)
    assert gate.gate.warming_up and other.perplexity.warming_up and other.perplexity.target is None
    assert [gate.gate.update(h) for h in (0.9, 0.6, 0.8, 0.8)] == [0, 0, 0, 0.5] and gate.gate.h_warm == 0.8
    found = [other.perplexity.update(torch.tensor([p])).item() for p in (1.4, 2.0, 1.7, 2.4)]
    assert found[:3] == [0, 0, 0] and found[3] == pytest.approx(0.2 * math.log(1.5))


def test_a_changed_rule_applies_to_the_measured_perplexities() -> None:
    saved = strength(BY_PERPLEXITY)
    assert saved.perplexity is not None
    for _ in range(6):
        saved.perplexity.update(torch.tensor([2.0], dtype=torch.float64))
    changed = strength(f"{BY_PERPLEXITY} perplexity.target_ratio=0.8")
    assert changed.perplexity is not None
    said = changed.load_state_dict(state_of(saved), of="antisd")
    assert changed.perplexity.target == pytest.approx(1.6) and not changed.perplexity.warming_up
    assert said == ["perplexity.target is 1.6 from here on; it was 1.9 up to the checkpoint"]


@pytest.mark.parametrize("earlier", ["algorithm.name=grpo", BY_PERPLEXITY])
def test_a_warm_up_without_a_gate_begins_after_a_run_without_one(earlier: str) -> None:
    """sd and no_gate honour gate.warmup_steps, in which outliers are measured, also when they continue such a run."""
    sd = strength("algorithm.name=sd gate.warmup_steps=2")
    sd.load_state_dict(state_of(strength(earlier)), of="antisd")
    assert [sd.gate.update(0.5) for _ in range(3)] == [0, 0, 0.5]


@pytest.mark.parametrize(
    ("before", "after"), [("antisd", "student_entropy_gate"), ("no_teacher", "antisd"), ("grpo", "antisd")]
)
def test_a_gate_on_another_entropy_is_calibrated_anew(before: str, after: str) -> None:
    outliers = "algorithm.outlier_deviations=2 gate.warmup_steps=1"
    saved, made = strength(f"algorithm.name={before} {outliers}"), strength(f"algorithm.name={after} {outliers}")
    saved.gate.update(3.0)
    if saved.outliers is not None:
        saved.outliers.record(1.0)
    assert made.load_state_dict(state_of(saved), of=before) == []
    assert made.gate.h_warm is None and made.gate.warming_up and made.outliers is not None and made.outliers.measuring
    assert [made.gate.update(0.8) for _ in range(2)] == [0, 0.5] and made.gate.h_warm == 0.8


def test_outliers_of_another_u_are_measured_anew() -> None:
    options = "algorithm.outlier_deviations=2 gate.warmup_steps=1"
    saved, made = strength(f"algorithm.name=no_teacher {options}"), strength(f"algorithm.name=no_gate {options}")
    assert saved.outliers is not None and made.outliers is not None
    saved.gate.update(3.0)
    saved.outliers.record(1.0)
    made.load_state_dict(state_of(saved), of="no_teacher")
    assert made.outliers.measuring


BF16, FP8 = "bfloat16", "fp8 blockwise (1 + 1 layers bfloat16)"
OUTLIERS = "algorithm.outlier_deviations=2"


def in_format(text: str, present: str, other: str | None = None) -> TermStrength:
    warm_up = "perplexity" if BY_PERPLEXITY in text else "gate"
    pairs = f"{OUTLIERS} {warm_up}.warmup_steps=2 {text}".split()
    recipe: Any = make_recipe(MINIMAL, [f"--{pair}" for pair in pairs])
    plain, fp8 = (other, present) if present == FP8 else (present, other)
    return make_strength(recipe, ALONE, ScoreFormats(plain or "float32", fp8, in_fp8=present == FP8))


def warmed(text: str, present: str) -> TermStrength:
    """After its warm-up: H_warm 0.8, a mean perplexity of 1.5, a deviation of u of 3."""
    made = in_format(text, present)
    for _ in range(2):
        made.gate.update(0.8)
        if made.perplexity is not None:
            made.perplexity.update(torch.tensor([1.5]))
        assert made.outliers is not None
        made.outliers.record(3.0)
    return made


def probe_of(bfloat16: Statistics, fp8: Statistics) -> Probe:
    return Probe({}, bfloat16, fp8, tokens=20)


@pytest.mark.parametrize(("before", "after", "factor"), [(BF16, FP8, 0.9), (FP8, BF16, 1 / 0.9)])
def test_levels_are_rescaled_when_the_scores_change_their_number_format(before: str, after: str, factor: float) -> None:
    """By the ratio of the same tokens in both, once, in the first step that has tokens; the gate does not reopen."""
    plain, moved = Statistics(0.7, 0.8, 1.6, 2.0), Statistics(0.35, 0.72, 2.0, 3.0)
    saved = warmed("", before)
    saved.gate.update(0.1)  # closed
    made = in_format("", after, before)
    said = made.load_state_dict(state_of(saved), of="antisd")
    assert len(said) == 1 and "gate.h_warm" in said[0] and after in said[0] and before in said[0]
    assert made.needs_probe and made.gate.h_warm == 0.8

    assert made.rescale(probe_of(Statistics(), Statistics())) == []  # no rollout had context
    assert made.needs_probe and state_of(made)["scores"] == before  # as a checkpoint of this step says
    said = made.rescale(probe_of(plain, moved))
    assert len(said) == 2 and "gate.h_warm" in said[0] and "outlier_deviations" in said[1]
    assert all("20 tokens: few" in line for line in said)
    assert made.gate.h_warm == pytest.approx(0.8 * factor) and not made.gate.is_open
    deviation = 1.5 if after == FP8 else 1 / 1.5
    assert made.outliers is not None and made.outliers.limit == pytest.approx(6.0 * deviation)
    assert not made.needs_probe and state_of(made)["scores"] == after

    same = in_format("", after, before)
    assert same.load_state_dict(state_of(made), of="antisd") == [] and not same.needs_probe
    by_student = in_format("algorithm.name=student_entropy_gate", after, before)
    by_student.load_state_dict(
        state_of(warmed("algorithm.name=student_entropy_gate", before)), of="student_entropy_gate"
    )
    by_student.rescale(probe_of(plain, moved))
    assert by_student.gate.h_warm == pytest.approx(0.8 * (0.5 if after == FP8 else 2))


def test_so_is_the_perplexitys_target() -> None:
    made = in_format(BY_PERPLEXITY, FP8, BF16)
    made.load_state_dict(state_of(warmed(BY_PERPLEXITY, BF16)), of="antisd")
    made.rescale(probe_of(Statistics(perplexity=1.6, deviation=1.0), Statistics(perplexity=2.0, deviation=1.0)))
    assert made.perplexity is not None and made.perplexity.target == pytest.approx(1.5 * 1.25 - 0.1)


def test_levels_of_a_format_that_the_model_lost_are_measured_again() -> None:
    made = in_format("", BF16)
    (said,) = made.load_state_dict(state_of(warmed("", FP8)), of="antisd")
    assert said.startswith("warning:") and "measured again" in said and not made.needs_probe
    assert made.gate.h_warm is None and [made.gate.update(h) for h in (0.9, 0.9, 0.9)] == [0, 0, 0.5]
    assert made.outliers is not None and made.outliers.measuring and state_of(made)["scores"] == BF16


def test_a_given_level_stays_and_the_run_warns() -> None:
    saved = warmed("gate.h_warm=0.7", BF16)
    for other in (BF16, None):
        made = in_format("gate.h_warm=0.7", FP8, other)
        said = made.load_state_dict(state_of(saved), of="antisd")
        assert "gate.h_warm was set for those" in said[0] and made.gate.h_warm == 0.7
        assert made.gate.update(0.5) == 0  # no new warm-up, and the level acts
    older = {**state_of(saved), "scores": None}  # a checkpoint of before formats were remembered
    assert made.load_state_dict(older, of="antisd") == []


def _by_perplexity(warmup_steps: str) -> str:
    return f"{BY_PERPLEXITY} perplexity.warmup_steps={warmup_steps}"


@pytest.mark.parametrize(
    ("text", "remedy"),
    [("", "gate.warmup_steps"), (BY_PERPLEXITY, "perplexity.warmup_steps"), ("algorithm.name=grpo", None)],
)
def test_a_run_that_ends_in_its_warm_up_says_so(text: str, remedy: str | None) -> None:
    pairs = [f"--{pair}" for pair in f"run.steps=5 {text}".split()]
    said = never_acts(make_recipe(MINIMAL, pairs))  # type: ignore[arg-type]
    assert (said is None) == (remedy is None) and (remedy or "") in (said or "")
    assert "set algorithm.name grpo" in str(never_acts(make_recipe(MINIMAL, ["--algorithm.lambda_max=0"])))
    assert never_acts(make_recipe(MINIMAL, [*pairs, "--run.steps=6"])) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["algorithm.name=antisd", BY_PERPLEXITY])
def test_so_does_a_resumed_run_whose_warm_up_takes_the_steps_that_are_left(text: str) -> None:
    recipe: Any = make_recipe(MINIMAL, [f"--{pair}" for pair in f"run.steps=100 {text}".split()])
    made, done = make_strength(recipe, ALONE), 96  # a checkpoint of grpo: the warm-up is still to be made
    assert "leaves 4 after step 96" in (never_acts(recipe, done=done, warm_up=made.warm_up) or "")
    for _ in range(5):
        assert never_acts(recipe, done=done, warm_up=made.warm_up) is not None or made.warm_up < 4
        made.gate.update(0.7)
        if made.perplexity is not None:
            made.perplexity.update(torch.tensor([1.5]))
    assert made.warm_up == 0 and never_acts(recipe, done=done, warm_up=made.warm_up) is None


def test_equal_us_have_no_deviation_to_limit_outliers_by() -> None:
    made = strength("algorithm.outlier_deviations=2 gate.warmup_steps=1")
    inputs: Any = SimpleNamespace(term_mask=torch.tensor([True, True, False]), weight=torch.zeros(3))
    for us in ([0.3, 0.3, 9.0], [1.0, 3.0, 9.0]):
        assert made.outliers is not None and made.outliers.measuring
        made.learn(inputs, SimpleNamespace(constants=SimpleNamespace(pmi=torch.tensor(us))))  # type: ignore[arg-type]
    assert made.outliers is not None and made.outliers.limit == 2.0


def test_a_rank_without_responses() -> None:
    nothing = torch.zeros(0)
    assert response_perplexities(nothing, nothing.bool(), nothing.long(), 0).shape == (0,)
    table = SimpleNamespace(rollouts=0, spread=lambda values: values)
    layout = SimpleNamespace(device=torch.device("cpu"))
    batch: Any = SimpleNamespace(total=3, indices=[], table=table, layout=layout)
    inputs: Any = SimpleNamespace(
        loss_mask=nothing.bool(),
        has_context=nothing.bool(),
        segment=nothing.long(),
        weight=nothing,
        term_mask=nothing.bool(),
    )
    teacher: Any = SimpleNamespace(logprobs=nothing)
    assert passes.teacher_perplexities(ALONE, batch, inputs, teacher).tolist() == [0.0] * 3  # other ranks add theirs
    assert passes.per_token(batch, torch.ones(3)).shape == (0,)
    assert passes.pmi_deviation(ALONE, inputs, nothing) is None

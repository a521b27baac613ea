"""What sets lambda and the outlier limit of a run, made from recipes, and its state over changes of the recipe."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from asd_megatron.antisd import response_perplexities
from asd_megatron.config import make_recipe
from asd_megatron.run.build import make_strength, never_acts
from asd_megatron.run.strength import TermStrength
from asd_megatron.trainer import passes

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
    same.load_state_dict(state_of(gate), recalibrate=False)
    assert state_of(same) == state_of(gate) and same.gate.h_warm == 0.7
    other.load_state_dict(state_of(gate), recalibrate=False)
    assert other.perplexity is not None and other.perplexity.target is None and other.perplexity.warming_up
    assert other.outliers is not None and other.outliers.limit == 3.0  # u is the same in both
    back = strength("algorithm.name=antisd")
    back.load_state_dict(state_of(perplexity), recalibrate=False)
    assert back.gate.h_warm is None and back.gate.warming_up
    older = {"gate": state_of(gate)["gate"]}  # a checkpoint of before there were others
    other.load_state_dict(older, recalibrate=False)


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


def test_a_rank_without_responses() -> None:
    nothing = torch.zeros(0)
    assert response_perplexities(nothing, nothing.bool(), nothing.long(), 0).shape == (0,)
    table = SimpleNamespace(rollouts=0, spread=lambda values: values)
    batch: Any = SimpleNamespace(
        all_examples=[None] * 3, indices=[], table=table, layout=SimpleNamespace(device=torch.device("cpu"))
    )
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

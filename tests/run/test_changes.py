"""Which differences between a recorded and a present recipe a resumed run may have."""

from __future__ import annotations

from typing import Any

import pytest

from asd_megatron.config import make_recipe
from asd_megatron.run.changes import changes, not_accepted

MINIMAL: dict[str, Any] = {"model": {"path": "m"}, "data": {"train": "d.jsonl"}}


@pytest.mark.parametrize(
    "text", ["teacher.weights=ema", "teacher.weights=initial", "algorithm.kl_coefficient=0.1", "optimizer.beta1=0.8"]
)
def test_what_decides_the_training_is_refused(text: str) -> None:
    recorded = make_recipe(MINIMAL).model_dump(mode="json")
    found = changes(recorded, make_recipe(MINIMAL, [f"--{text}"]))
    key = text.partition("=")[0]
    assert [change.key for change in found] == [key]
    assert not_accepted(found, ()) == found and not_accepted(found, [key]) == []


def test_the_number_format_may_change() -> None:
    recorded = make_recipe(MINIMAL).model_dump(mode="json")
    arguments = ["--precision.fp8", "blockwise", "--precision.fp8_scores", "true"]
    found = changes(recorded, make_recipe(MINIMAL, arguments))
    assert [change.key for change in found] == ["precision.fp8", "precision.fp8_scores"]  # listed and recorded
    assert not_accepted(found, ()) == []


def test_where_the_teachers_states_wait_may_change() -> None:
    recorded = make_recipe(MINIMAL, ["--algorithm.estimator", "full_vocabulary"]).model_dump(mode="json")
    arguments = ["--algorithm.estimator", "full_vocabulary", "--algorithm.teacher_states", "host"]
    found = changes(recorded, make_recipe(MINIMAL, arguments))
    assert [change.key for change in found] == ["algorithm.teacher_states"] and not_accepted(found, ()) == []


def test_a_section_that_was_not_recorded_counts_with_its_defaults() -> None:
    recorded = make_recipe(MINIMAL).model_dump(mode="json")
    del recorded["teacher"]
    assert changes(recorded, make_recipe(MINIMAL)) == []
    (change,) = changes(recorded, make_recipe(MINIMAL, ["--teacher.weights", "ema"]))
    assert str(change) == 'teacher.weights: "live" -> "ema"'
    recorded = make_recipe(MINIMAL, kind="sft").model_dump(mode="json")  # an optional section, recorded as absent
    rewarded = make_recipe({**MINIMAL, "reward": {"name": "exact"}}, ["--data.test", "t.jsonl"], kind="sft")
    assert {change.key for change in changes(recorded, rewarded)} >= {"reward.name", "data.test"}

"""The sets of problems that a recipe evaluates on: what is refused, with what to change."""

from __future__ import annotations

from typing import Any

import pytest

from asd_megatron.config import Recipe, make_recipe
from asd_megatron.config.evaluation import EvaluationSetSection
from asd_megatron.errors import UserError
from asd_megatron.run.evaluation_sets import effective

MINIMAL: dict[str, Any] = {"model": {"path": "model"}, "data": {"train": "problems.jsonl"}}


def make(sets: Any, kind: Any = "train", **evaluation: Any) -> Any:
    return make_recipe({**MINIMAL, "evaluation": {**evaluation, "sets": sets}}, kind=kind)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ({"a": {"dta": "x"}}, "evaluation.sets.a.dta: unknown key; the keys of a set are data, schema"),
        ({"a": {}}, "evaluation.sets.a.data: missing"),
        ({"a": 3}, "evaluation.sets.a: expected a mapping of data, schema"),
        ({"a/b": {"data": "x"}}, "the name 'a/b' must begin with a letter"),
        ({"a": {"data": "x", "samples": 0}}, "evaluation.sets.a.samples: expected a whole number >= 1 or null"),
        ({"a": {"data": "x", "reward": "maths"}}, "evaluation.sets.a.reward 'maths' is no verifier"),
        ({"a": {"data": "puzzle:tset"}}, "use puzzle:test"),
        ({"a": {"data": "x", "reward": "reasoning_gym"}}, "sets alone: set evaluation.sets.a.reward"),
        (
            {"a": {"data": "reasoning_gym:chain_sum"}},
            "the reward math does not know how problems of chain_sum",
        ),
    ],
)
def test_a_set_that_cannot_work_is_refused(sets: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        make(sets)
    assert message in str(caught.value)


def test_a_set_has_not_the_name_of_the_test_set() -> None:
    values = {
        "model": {"path": "m"},
        "data": {"train": "x", "test": "y"},
        "evaluation": {"sets": {"test": {"data": "z"}}},
    }
    with pytest.raises(UserError, match="evaluation.sets.test: the name is that of data.test"):
        make_recipe(values, kind="train")


def test_sets_are_problems_to_measure_on() -> None:
    recipe: Recipe = make({"a": {"data": "x"}}, every=5)
    assert recipe.evaluates
    with pytest.raises(UserError, match="needs a reward to score the answers"):
        make({"a": {"data": "x"}}, kind="sft")
    assert make({"a": {"data": "x", "reward": "exact"}}, kind="sft").evaluates
    assert not make({}, kind="sft").evaluates


def test_a_set_has_the_values_of_its_section_where_it_has_none() -> None:
    recipe: Recipe = make({}, samples=4, temperature=0.7, problems=9)
    found = effective(recipe.evaluation, EvaluationSetSection(data="x", samples=32, temperature=0.0))
    assert (found.samples, found.temperature, found.top_p, found.problems) == (32, 0.0, 0.95, 9)

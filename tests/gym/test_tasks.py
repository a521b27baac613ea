"""Which tasks and parameters a recipe may name, and what an item depends on."""

from __future__ import annotations

import random
import sys
from typing import Any

import numpy as np
import pytest

from asd_megatron.errors import UserError
from asd_megatron.gym import tasks
from asd_megatron.gym.tasks import check_task, digest, findings, make_dataset, make_item, parameters_of, registry

OFFER = "Its parameters, with defaults: min_terms: 2, max_terms: 6, min_digits: 1, max_digits: 4, allow_negation: false"


def refusal(task: str, parameters: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        check_task(task, parameters)
    return str(caught.value)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"min_term": 2}, f"chain_sum has no parameter 'min_term'; did you mean 'min_terms'? {OFFER}"),
        ({"colour": 2}, f"chain_sum has no parameter 'colour'. {OFFER}"),
        ({"min_terms": "two"}, f"chain_sum's min_terms was given 'two': Input should be a valid integer. {OFFER}"),
        ({"min_terms": True}, "min_terms was given True: Input should be a valid integer"),
        ({"min_terms": 2.0}, "min_terms was given 2.0: Input should be a valid integer"),
        ({"min_terms": 9}, f"chain_sum refuses its parameters: max_terms must be >= min_terms. {OFFER}"),
        ({"seed": 3}, "seed cannot be set: training and held-out problems have seeds of their own"),
        ({"size": 3}, "size cannot be set"),
    ],
)
def test_unusable_parameters(parameters: dict[str, Any], message: str) -> None:
    assert message in refusal("chain_sum", parameters)


def test_unusable_tasks() -> None:
    assert "no such task; did you mean 'chain_sum'? docs/reasoning_gym_tasks.md lists" in refusal("chain_sums", {})
    assert "cannot be used: making its items runs code" in refusal("codeio", {})


@pytest.mark.parametrize(
    ("task", "parameters"),
    [
        ("basic_arithmetic", {"operators": ["+", "-"], "format_style": "natural"}),
        ("countdown", {"operators": ["+"]}),  # a tuple there
        ("word_sorting", {"transformation": "lowercase"}),  # an enum
        ("time_intervals", {"min_date": "2000-01-01"}),
        ("rearc", {"diff_ub": 0.3}),  # annotated int
        ("letter_jumble", {"min_corruption_level": 0}),
    ],
)
def test_values_of_every_kind(task: str, parameters: dict[str, Any]) -> None:
    check_task(task, parameters)


def test_a_mixture_of_tasks_is_checked_part_by_part() -> None:
    def mixture(name: str, **config: Any) -> dict[str, Any]:
        parts = [{"name": name, "weight": 1, "config": config}, {"name": "gcd", "weight": 2.5, "config": {}}]
        return {"datasets": parts}

    check_task("composite", mixture("chain_sum", max_terms=3))
    dataset = make_dataset("composite", mixture("chain_sum", max_terms=3), seed=5, size=20)
    sources = {make_item(dataset, i)["metadata"]["source_dataset"] for i in range(20)}
    assert sources == {"chain_sum", "gcd"}
    assert "did you mean 'chain_sum'" in refusal("composite", mixture("chain_sums"))
    assert "has no parameter 'max_term'" in refusal("composite", mixture("chain_sum", max_term=3))
    assert "cannot be used" in refusal("composite", mixture("codeio"))


def test_defaults_are_parameters() -> None:
    refused = {task for task, about in findings().items() if "unusable" in about} | {"composite"}
    for task in set(registry()) - refused:
        check_task(task, parameters_of(task))


def test_every_task_was_tried() -> None:
    assert set(findings()) == set(registry()), "run tools/sweep_reasoning_gym.py --write"


def test_an_item_depends_on_its_place_alone_and_leaves_the_random_state() -> None:
    for task in ("pool_matrix", "chain_sum"):  # the first seeds NumPy's global generator
        dataset = make_dataset(task, {}, seed=11, size=50)
        random.seed(1)
        np.random.seed(1)
        expected = random.Random(1).random(), np.random.RandomState(1).random()
        first = digest(make_item(dataset, 7))
        assert (random.random(), np.random.random()) == expected
        assert digest(make_item(make_dataset(task, {}, seed=11, size=50), 7)) == first
        assert digest(make_item(dataset, 8)) != first


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match=r"need the package reasoning-gym.*pip install 'asd_megatron\[gym\]'"):
        tasks.registry()

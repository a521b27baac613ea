"""Recipes with `reasoning_gym:` problem sets: what is refused when they are read."""

from __future__ import annotations

from typing import Any

import pytest

from asd_megatron.config import make_recipe
from asd_megatron.errors import UserError

TASK = "reasoning_gym:chain_sum"


def make(kind: Any = "train", reward: str | None = "reasoning_gym", **data: Any) -> Any:
    values: dict[str, Any] = {"model": {"path": "m"}, "data": {"train": TASK, **data}}
    if reward is not None:
        values["reward"] = {"name": reward}
    return make_recipe(values, kind=kind)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train": "reasoning_gym:chain_sums"}, "did you mean 'chain_sum'"),
        ({"reasoning_gym": {"max_term": 3}}, "chain_sum has no parameter 'max_term'; did you mean 'max_terms'"),
        ({"reward": "math"}, "reward.name math does not know how problems of data.train are judged: set reward.name"),
        ({"train": "x.jsonl"}, "data.train 'x.jsonl' is none: set reward.name to another verifier"),
        ({"test": "x.jsonl"}, "data.test 'x.jsonl' is none"),
        ({"train": "x.jsonl", "reward": "math", "test_problems": 9}, "data.test_problems is read only with"),
        ({"train": "x.jsonl", "reward": "math", "reasoning_gym": {"a": 1}}, "data.reasoning_gym is read only with"),
        ({"test": "reasoning_gym:gcd", "reasoning_gym": {"max_terms": 3}}, "name two (chain_sum and gcd)"),
        ({"kind": "sft"}, "holds problems without responses"),
        ({"test_problems": 10_001}, "a whole number >= 1 and <= 10000"),
    ],
)
def test_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        make(**given)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "given",
    [
        {"reasoning_gym": {"max_terms": 3}, "test_problems": 50},
        {"test": "reasoning_gym:gcd"},
        {"reward": "file.py:function", "test": "x.jsonl"},
        {"train": "x.jsonl", "test": TASK, "reward": "file.py:function", "reasoning_gym": {"max_terms": 3}},
        {"kind": "sft", "train": "x.jsonl", "test": TASK},
    ],
)
def test_accepted(given: dict[str, Any]) -> None:
    make(**given)

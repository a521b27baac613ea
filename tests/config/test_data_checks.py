"""Refusals of the section `data`; each with what to change."""

from __future__ import annotations

from typing import Any

import pytest

from asd_megatron.config import make_recipe
from asd_megatron.errors import UserError

A, B = {"path": "a.jsonl"}, {"path": "b.jsonl", "weight": 2}


def refusal(kind: Any = "train", overrides: list[str] | None = None, **data: Any) -> str:
    with pytest.raises(UserError) as e:
        make_recipe({"model": {"path": "m"}, "data": data}, overrides or [], kind=kind)
    return str(e.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"train": []}, "data.train: the list is empty"),
        (
            {"train": [A, {"path": "b", "wieght": 2}]},
            "data.train: set 2 of the list: unknown key 'wieght': did you mean 'weight'",
        ),
        ({"train": [A, {"path": "b", "weight": 0}]}, "data.train: set 2 of the list: weight: "),
        ({"train": [A, {"path": "b", "weight": 1e308}]}, "data.train: set 2 of the list: weight: "),
        ({"train": [A, 3]}, "set 2 of the list must be a path, or a mapping of path, weight, schema, fields"),
        ({"train": [A, "a.jsonl"]}, "data.train lists 'a.jsonl' twice: give it once, with the sum of the weights"),
        ({"train": [A, "puzzle:train"]}, "'puzzle:train' is no file, and a list mixes files alone"),
        ({"train": [A, B], "schema": "verl"}, "give schema to the set of the list"),
        ({"train": [A, {**B, "schema": "gsm8"}]}, "there is no schema 'gsm8': did you mean 'gsm8k'"),
        ({"train": "a", "fields": {"anwser": "x"}}, "there is no field 'anwser': did you mean 'answer'"),
        ({"train": "puzzle:train", "filter": {"duplicates": "drop"}}, "data.filter is read only with files"),
        ({"train": "a", "test_schema": "gsm8k"}, "data.test_schema is read only with a file as data.test"),
        (
            {"train": "a", "filter": {"min_pass_rate": 0.1}},
            "data.filter.min_pass_rate 0.1 needs data.filter.pass_rate_field",
        ),
        (
            {"train": "a", "filter": {"pass_rate_field": "r"}},
            "leaves nothing out between 0 and 1: set data.filter.min_pass_rate",
        ),
        ({"train": "a", "filter": {"pass_rate_field": "r", "min_pass_rate": 0.9, "max_pass_rate": 0.1}}, "lower it"),
    ],
)
def test_refusals(data: dict[str, Any], message: str) -> None:
    assert message in refusal(**data)


def test_the_supervised_stage_reads_one_file_as_it_is() -> None:
    assert "the supervised stage reads one file or folder" in refusal("sft", train=[A, B])
    assert "data.filter is for sets of problems" in refusal("sft", train="a", filter={"duplicates": "drop"})


def test_overrides_of_train_and_filter() -> None:
    def data(*overrides: str) -> Any:
        return make_recipe({"model": {"path": "m"}, "data": {"train": "a"}}, list(overrides)).data

    assert data("--data.train", "b: c.jsonl").train == "b: c.jsonl"
    mixed = data("--data.train", "[x.jsonl, {path: y.jsonl, weight: 3}]")
    assert [(s.path, s.weight) for s in mixed.train_sets] == [("x.jsonl", 1.0), ("y.jsonl", 3.0)]
    assert mixed.train_name == "x.jsonl + y.jsonl"
    chosen = data("--data.filter.duplicates", "drop", "--data.filter.max_prompt_chars", "99").filter
    assert (chosen.duplicates, chosen.max_prompt_chars) == ("drop", 99)

"""The generated page and the help text hold every key, and the page in docs/ is the one the schema makes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from asd_megatron.config import load_recipe, make_recipe, render_help, render_reference
from asd_megatron.config.recipe import SCHEMAS, Kind
from asd_megatron.config.refusals import dotted_keys

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"


def test_the_page_in_docs_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == render_reference(), "run `make docs`"


def test_the_page_holds_every_key() -> None:
    page = render_reference()
    for schema in SCHEMAS.values():
        for dotted in dotted_keys(schema):
            assert f"| `{dotted.partition('.')[2]}` |" in page, dotted


@pytest.mark.parametrize("kind", ["train", "sft"])
def test_help_holds_every_key(kind: Kind) -> None:
    text = render_help(kind)
    for dotted in dotted_keys(SCHEMAS[kind]):
        assert f"  --{dotted}  " in text, dotted
    assert "--gate.tau_down  number > 0 [0.93]" in render_help("train")


def test_the_options_page_has_recipes_that_work() -> None:
    """Its blocks as they stand, and the keys and values of its table of algorithms."""
    page = (PAGE.parent / "options.md").read_text(encoding="utf-8")
    minimal: dict[str, Any] = {"model": {"path": "m"}, "data": {"train": "t"}}
    for block in re.findall("```yaml\n(.*?)```", page, flags=re.DOTALL):
        assert make_recipe({**minimal, **yaml.safe_load(block)}, [], "train").algorithm.name
    table = page.split("## Published algorithms")[1].split("\n\n")[1]
    for row in table.splitlines()[2:]:
        given = ["--algorithm.name=grpo"]
        for key, value in re.findall(r"`([a-z_.]+): ([^`]+)`", row):
            given.append(f"--{key if '.' in key else f'algorithm.{key}'}={value}")
        if "constant_length" in row:
            given.append("--algorithm.constant_length=1024")
        if "overlong_buffer" in row:
            given.append("--sampling.max_response_tokens=20480")
        if "kl_estimator" in row:
            given.append("--algorithm.kl_coefficient=0.001")
        assert make_recipe(minimal, given, "train").algorithm.name == "grpo", row


EXAMPLES = PAGE.parents[1] / "examples"
# Studies are no recipes: tests/study/test_schema.py loads them. The paper's come in parts: tests/planner/test_paper.py.
OTHERS = {*EXAMPLES.glob("studies/*.yaml"), *EXAMPLES.glob("paper/**/*.yaml")}
RECIPES = sorted(set(EXAMPLES.glob("**/*.yaml")) - OTHERS)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_the_example_recipes_are_valid(path: Path) -> None:
    kind: Kind = "sft" if "\nsft:" in path.read_text(encoding="utf-8") else "train"
    assert load_recipe(path, kind=kind).run.name

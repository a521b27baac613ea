"""The generated page and the help text hold every key, and the page in docs/ is the one the schema makes."""

from __future__ import annotations

from pathlib import Path

import pytest

from asd_megatron.config import load_recipe, render_help, render_reference
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


EXAMPLES = PAGE.parents[1] / "examples"
# Studies are no recipes: tests/study/test_schema.py loads them. The paper's come in parts: tests/planner/test_paper.py.
OTHERS = {*EXAMPLES.glob("studies/*.yaml"), *EXAMPLES.glob("paper/**/*.yaml")}
RECIPES = sorted(set(EXAMPLES.glob("**/*.yaml")) - OTHERS)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_the_example_recipes_are_valid(path: Path) -> None:
    kind: Kind = "sft" if "\nsft:" in path.read_text(encoding="utf-8") else "train"
    assert load_recipe(path, kind=kind).run.name

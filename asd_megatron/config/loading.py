"""Reading a recipe: YAML, command-line overrides, the schema, then the cross-checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, overload

from pydantic import ValidationError

from asd_megatron.config.checks import check_recipe
from asd_megatron.config.overrides import apply_overrides
from asd_megatron.config.recipe import SCHEMAS, AnyRecipe, Kind, Recipe, SftRecipe
from asd_megatron.config.refusals import explain
from asd_megatron.config.yaml_text import read_yaml
from asd_megatron.errors import UserError


@overload
def make_recipe(
    values: Mapping[str, Any], overrides: Sequence[str] = (), kind: Literal["train"] = "train", source: str = "recipe"
) -> Recipe: ...
@overload
def make_recipe(
    values: Mapping[str, Any], overrides: Sequence[str] = (), *, kind: Literal["sft"], source: str = "recipe"
) -> SftRecipe: ...
@overload
def make_recipe(
    values: Mapping[str, Any], overrides: Sequence[str] = (), kind: Kind = "train", source: str = "recipe"
) -> AnyRecipe: ...
def make_recipe(
    values: Mapping[str, Any], overrides: Sequence[str] = (), kind: Kind = "train", source: str = "recipe"
) -> AnyRecipe:
    """A checked recipe from nested values (section -> key -> value) and `--section.key value` overrides.

    Raises UserError, naming `source`, for unknown keys and wrong types, and for combinations that cannot work on any
    machine; `check_world`, `check_devices` and `check_model` look at the ranks, the machine and the model.
    """
    schema = SCHEMAS[kind]
    other: Kind = "sft" if kind == "train" else "train"
    for name in values:
        if name in SCHEMAS[other].model_fields and name not in schema.model_fields:
            raise UserError(
                f"{source}: the section {name} belongs to a recipe of `asd-megatron {other}`: use that (`launch` takes"
                " --sft, `plan` only recipes of train), or remove the section"
            )
    merged = apply_overrides(dict(values), overrides, schema)
    merged = {name: {} if section is None and name != "reward" else section for name, section in merged.items()}
    try:
        recipe = schema.model_validate(merged)
    except ValidationError as error:
        raise UserError(f"{source}:{explain(error, schema)}") from None
    check_recipe(recipe)
    return recipe


@overload
def load_recipe(path: str | Path, overrides: Sequence[str] = (), kind: Literal["train"] = "train") -> Recipe: ...
@overload
def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, kind: Literal["sft"]) -> SftRecipe: ...
@overload
def load_recipe(path: str | Path, overrides: Sequence[str] = (), kind: Kind = "train") -> AnyRecipe: ...
def load_recipe(path: str | Path, overrides: Sequence[str] = (), kind: Kind = "train") -> AnyRecipe:
    """Read a YAML recipe, put the overrides in and check it. Paths in it are relative to the current directory.

    `overrides` may begin with further YAML files, of the same form: their keys replace the recipe's, later files win,
    then come `--section.key value`.

    Raises UserError for what `read_yaml` and `make_recipe` refuse.
    """
    files = list(takewhile(lambda argument: argument.endswith((".yaml", ".yml")), overrides))
    merged = _sections(path)
    for file in files:
        merged = _merged(merged, _sections(file))
    return make_recipe(merged, overrides[len(files) :], kind, " + ".join([f"recipe {path}", *files]))


def _sections(path: str | Path) -> dict[str, Any]:
    """A recipe's YAML file: section -> its value."""
    values = read_yaml(Path(path), "recipe")
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"recipe {path}: expected sections such as `model:`, found {type(values).__name__}")
    return {str(name): section for name, section in values.items()}


def _merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with the keys of `changes` in their place. A section without keys changes nothing."""
    merged = dict(values)
    for name, section in changes.items():
        before = merged.get(name)
        if isinstance(before, dict) and isinstance(section, dict):
            merged[name] = before | section
        elif section is not None or name not in merged:
            merged[name] = section
    return merged

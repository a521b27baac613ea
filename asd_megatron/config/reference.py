"""The reference of every recipe key, made from the schema: a page (docs/recipes.md) and the text of `--help`."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from asd_megatron.config.base import section_schema, type_in_words
from asd_megatron.config.recipe import SCHEMAS, Kind
from asd_megatron.config.yaml_text import to_yaml

_INTRO = """\
# Recipes

<!-- Written by `make docs` from asd_megatron/config; edit the descriptions there. -->

A recipe is a YAML file of sections with keys. `asd-megatron train RECIPE` (or
`torchrun ... -m asd_megatron.train RECIPE`) runs one, `asd-megatron sft RECIPE` a supervised one. Any key can be given
on the command line instead, where it wins over the file; values are YAML:

    asd-megatron train recipe.yaml --algorithm.name grpo --optimizer.learning_rate 5e-7 --sampling.stop='["\\n"]'

Only `model.path` and `data.train` must be given. An unknown key, a value of the wrong type and a combination that
cannot work are refused before anything starts, with what to change. Paths are relative to the current directory. A run
saves its recipe, with every key, as `recipe.yaml` in its folder; that file is a recipe too.

The eight conditions differ in one line, `algorithm.name`.
"""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return ", ".join(f"{key}: {_plain(inner)}" for key, inner in value.model_dump().items())
    if isinstance(value, tuple | dict):
        return str(list(value)) if isinstance(value, tuple) else str(value)
    if isinstance(value, str):
        return value.replace("\n", "\\n") or '""'
    return _yaml(value)


def _yaml(value: Any) -> str:
    return to_yaml(value).removesuffix("...\n").strip()


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else _yaml(value)


def _sections(schema: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    for name in schema.model_fields:
        yield name, section_schema(schema, name)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _type(field: FieldInfo) -> str:
    return type_in_words(field).replace("a whole number", "whole number").removeprefix("a ")


def _table(section: type[BaseModel]) -> str:
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key, field in section.model_fields.items():
        default = _default(field)
        shown = default if default == "required" else f"`{default}`"
        rows.append(f"| `{key}` | {_cell(_type(field))} | {_cell(shown)} | {_cell(field.description or '')} |")
    return "\n".join(rows)


def _note(schema: type[BaseModel], name: str) -> str:
    """What a recipe class says of a section beyond the section itself: that it may be missing."""
    about = schema.model_fields[name].description
    return f" (may be left out: {about[0].lower()}{about[1:].rstrip('.')})" if about else ""


def render_reference() -> str:
    """The page docs/recipes.md: a table of keys for each section of both kinds of recipe."""
    parts = [_INTRO]
    shown: dict[str, type[BaseModel]] = {}
    for kind, schema in SCHEMAS.items():
        parts.append(f"## `asd-megatron {kind}`\n")
        same = [f"`{name}`{_note(schema, name)}" for name, section in _sections(schema) if shown.get(name) is section]
        if same:
            parts.append(f"As above: {', '.join(same)}.\n")
        for name, section in _sections(schema):
            if shown.get(name) is section:
                continue
            shown.setdefault(name, section)
            about = (section.__doc__ or "").strip().split("\n\n")[0].replace("\n    ", " ")
            parts.append(f"### {name}\n\n{about}{_note(schema, name)}\n\n{_table(section)}\n")
    return "\n".join(parts)


def render_help(kind: Kind = "train", width: int = 100) -> str:
    """Every key of a recipe as `--help` prints it: `--section.key  TYPE [default]` and the meaning below."""
    lines: list[str] = []
    for name, section in _sections(SCHEMAS[kind]):
        lines.append(f"\n{name}:")
        for key, field in section.model_fields.items():
            default = _default(field)
            lines.append(f"  --{name}.{key}  {_type(field)} [{default}]")
            about = (field.description or "").replace("`", "")
            lines += textwrap.wrap(about, width, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines).lstrip("\n")

"""Command-line overrides: `--section.key value` and `--section.key=value`, values in YAML."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from asd_megatron.config.base import section_schema, subsection, takes_list, takes_null, takes_text
from asd_megatron.config.refusals import dotted_keys, unknown_key
from asd_megatron.config.yaml_text import parse_yaml, to_yaml
from asd_megatron.errors import UserError

FLAGS = {"dryrun": "--dry-run", "help": "--help"}
"""The flags of `asd-megatron train` and `sft`, by their letters. The command has removed them from its overrides."""


def check_flag(argument: str) -> None:
    """Raise UserError for an argument that is meant as a flag: `--dry_run`, `-dryrun`, `--dry-run=true`."""
    given = argument.partition("=")[0]
    letters = given.lower().replace("-", "").replace("_", "")
    near = difflib.get_close_matches(letters, FLAGS, n=1, cutoff=0.8)
    if near:
        raise UserError(
            f"unexpected argument {argument!r}: did you mean {FLAGS[near[0]]}? `asd-megatron train` and"
            " `asd-megatron sft` take it, without a value"
        )


def split_overrides(arguments: Sequence[str], schema: type[BaseModel] | None = None) -> list[tuple[str, str]]:
    """`["--a.b", "1", "--c.d=2"]` -> `[("a.b", "1"), ("c.d", "2")]`. Raises UserError for anything else; with `schema`,
    a key that it lacks is named as such when its value is missing too."""
    pairs: list[tuple[str, str]] = []
    index = 0
    while index < len(arguments):
        argument = arguments[index]
        index += 1
        check_flag(argument)
        if argument.endswith((".yaml", ".yml")):
            raise UserError(
                f"unexpected argument {argument!r}: further recipe files come right after the first one, before"
                " `--section.key value`"
            )
        if not argument.startswith("--") or argument == "--":
            raise UserError(
                f"unexpected argument {argument!r}: after the recipe's files (.yaml, .yml) come overrides,"
                " `--section.key value`"
            )
        key, equals, value = argument[2:].partition("=")
        if not equals:
            if index == len(arguments) or arguments[index].startswith("--"):
                if schema is not None and key not in dotted_keys(schema):
                    raise UserError(f"override {unknown_key(schema, key)}")
                raise UserError(
                    f"override --{key} has no value: write `--{key} value`, or `--{key}=value` for one that begins"
                    " with --"
                )
            value = arguments[index]
            index += 1
        pairs.append((key, value))
    return pairs


def apply_overrides(values: dict[str, Any], arguments: Sequence[str], schema: type[BaseModel]) -> dict[str, Any]:
    """`values` (section -> key -> value) with the overrides put in; the last of several wins. `values` is not changed.

    Values are YAML; for a key that holds free text they are taken literally, so `--run.name 3` and
    `--data.raw_prompt "Q: {prompt}"` need no quotes inside the quotes; `null` stays null where the key takes it, and a
    value in quotes is read as YAML, escapes included. Types are checked later, by the schema.
    Raises UserError for an unknown section or key, naming the nearest valid one, and for a value that is not YAML.
    """
    out = {name: dict(section) if isinstance(section, dict) else section for name, section in values.items()}
    for dotted, text in split_overrides(arguments, schema):
        section_name, _, key = dotted.partition(".")
        section = schema.model_fields.get(section_name)
        if section is None or not key:
            raise UserError(f"override {unknown_key(schema, dotted)}")
        fields = section_schema(schema, section_name).model_fields
        outer, _, inner = key.partition(".")
        inside = subsection(section_schema(schema, section_name), outer)
        if inside is not None and inner:  # --run.timeout.update 600
            given = (out.get(section_name) or {}).get(outer)
            given = given if isinstance(given, dict) else {}
            text, key = to_yaml({**given, inner: parse_yaml(text, f"override --{dotted}")}), outer
        if key not in fields:
            if outer != key and outer in fields:
                raise UserError(
                    f"override --{dotted}: {section_name}.{outer} is one value: `--{section_name}.{outer} VALUE`, "
                    "a mapping as '{name: value}'"
                )
            raise UserError(f"override {unknown_key(schema, dotted)}")
        target = out.setdefault(section_name, {})
        if target is None:
            target = out[section_name] = {}
        if not isinstance(target, dict):
            raise UserError(f"section {section_name}: expected a mapping of keys, so --{dotted} cannot be put in")
        target[key] = _value(text, fields[key], dotted)
    return out


def _value(text: str, field: Any, dotted: str) -> Any:
    if not takes_text(field) or takes_list(field) and text.startswith("["):
        return parse_yaml(text, f"override --{dotted}")
    if takes_null(field) and text in ("null", "~", ""):
        return None
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"":
        return parse_yaml(text, f"override --{dotted}")
    return text

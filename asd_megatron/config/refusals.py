"""The messages of refused recipes: the key, what was given, what is expected, the nearest valid key."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from asd_megatron.config import foreign
from asd_megatron.config.base import (
    Section,
    member_section,
    section_schema,
    subsection,
    type_in_words,
    value_in_words,
)

GENERIC = {"name", "path", "every"}  # keys that mean another thing in each section
RENAMED_KEYS = {
    "rollout.receipt": "rollout.verify_weights",
    "rollout.receipt_tolerance": "rollout.verify_tolerance",
}
"""Keys of earlier versions, each with its new name."""

BASELINES = ("opsd", "sdft", "sdpo")
"""Methods of others that examples/baselines has in terms of the recipe."""
ALGORITHMS = ("dapo", "dr_grpo", "drgrpo", "rloo", "gspo", "cispo", "reinforce_plus_plus")
"""Algorithms that are options of others here."""


def changed(section: Section, *keys: str) -> dict[str, Any]:
    """Those of `keys`, by default of all, whose values differ from their defaults, with their values."""
    fields = type(section).model_fields
    values = {key: getattr(section, key) for key in keys or fields}
    return {key: value for key, value in values.items() if value != fields[key].default}


def unread(name: str, section: Section, *keys: str, needs: str) -> Iterator[str]:
    """The refusals of `keys` of the section `name` that were changed although only a recipe with `needs` reads them."""
    for key, value in changed(section, *keys).items():
        yield f"{name}.{key} {value} is read only with {needs}: set that, or leave {name}.{key} out"


def dotted_keys(schema: type[BaseModel]) -> list[str]:
    """Every `section.key` of a recipe class, in order."""
    return [f"{name}.{key}" for name in schema.model_fields for key in section_schema(schema, name).model_fields]


def nearest_key(schema: type[BaseModel], dotted: str) -> str | None:
    """The valid key or section that `dotted` plausibly means; None when nothing is like it.

    In this order: one in its own section that begins with the given words (`reward.timeout` ->
    `reward.timeout_seconds`), the same key in another section (`optimizer.steps` -> `run.steps`), a similar one in its
    own section, a similar one anywhere.
    """
    keys = dotted_keys(schema)
    section, _, key = dotted.partition(".")
    if not key:  # a bare key or section: `--steps`, `algoritm:`
        section, key = "", section
    own = [candidate.partition(".")[2] for candidate in keys if candidate.startswith(f"{section}.")]
    words = key.split("_")
    if begun := [name for name in own if name.split("_")[: len(words)] == words]:
        return f"{section}.{begun[0]}"
    same = [candidate for candidate in keys if candidate.partition(".")[2] == key]
    if same and key in GENERIC and section in schema.model_fields:
        return None
    if same:
        return difflib.get_close_matches(dotted, same, n=1, cutoff=0.0)[0] if section else same[0]
    if close := difflib.get_close_matches(key, own, n=1, cutoff=0.7):
        return f"{section}.{close[0]}"
    if not section and (close := difflib.get_close_matches(key, list(schema.model_fields), n=1, cutoff=0.75)):
        return close[0]
    by_name = {candidate.partition(".")[2]: candidate for candidate in reversed(keys)}
    close = difflib.get_close_matches(key, list(by_name), n=1, cutoff=0.8)
    return by_name[close[0]] if close else None


def unknown_key(schema: type[BaseModel], dotted: str) -> str:
    """`algorithm.lamda: unknown key; the nearest valid one is algorithm.lambda_max`; another framework's key gets the
    one that does its work here, or why there is none."""
    if (new := RENAMED_KEYS.get(dotted)) in dotted_keys(schema):
        return f"{dotted}: this key is now called {new}"
    if dotted in schema.model_fields:
        keys = ", ".join(f"{dotted}.{key}" for key in section_schema(schema, dotted).model_fields)
        return f"{dotted}: a section takes no value of its own; its keys: {keys}"
    if ours := foreign.counterparts(dotted, {*dotted_keys(schema), *schema.model_fields}):
        return f"{_unknown(dotted, ours[0])}; here it is {' or '.join(ours)}"
    if reason := foreign.reason_without(dotted):
        return f"{_unknown(dotted, '')}; {reason}"
    if nearest := nearest_key(schema, dotted):
        return f"{_unknown(dotted, nearest)}; the nearest valid one is {nearest}"
    section = dotted.partition(".")[0]
    if "." in dotted and section in schema.model_fields:
        keys = ", ".join(section_schema(schema, section).model_fields)
        return f"{_unknown(dotted, '')}; the keys of {section} are {keys}"
    return f"{_unknown(dotted, '')}; the sections are {', '.join(schema.model_fields)} (docs/recipes.md, or --help)"


def _unknown(dotted: str, meant: str) -> str:
    return f"{dotted}: unknown {'key' if '.' in dotted + meant else 'section'}"


def explain(error: ValidationError, schema: type[BaseModel]) -> str:
    """Pydantic's findings in the recipe's own terms; several stand one a line. Begins with a space or a new line."""
    lines: list[str] = []
    for finding in error.errors(include_url=False):
        line = _line(dict(finding), schema)
        if not any(known.startswith(line) for known in lines):  # each member of a union reports
            lines.append(line)
    return f" {lines[0]}" if len(lines) == 1 else "".join(f"\n  {line}" for line in lines)


def _line(finding: dict[str, Any], schema: type[BaseModel]) -> str:
    location = [str(part) for part in finding["loc"]]
    dotted, kind, given = ".".join(location[:2]), finding["type"], finding["input"]
    member = member_section(section_schema(schema, location[0]), location[1]) if len(location) > 2 else None
    if member is not None:
        return _in_member(dotted, location[2:], member, finding)
    if kind == "invalid_key" or location[-1] == "[key]":
        where = location[0] if kind == "invalid_key" else dotted
        return f"{where}: a key must be text, was given {value_in_words(given)}"
    inside = subsection(section_schema(schema, location[0]), location[1]) if len(location) > 2 else None
    if inside is not None:
        inner = inside.model_fields.get(location[2])
        if inner is None:
            return f"{dotted}.{location[2]}: unknown key; the keys of {dotted} are {', '.join(inside.model_fields)}"
        return f"{dotted}.{location[2]}: expected {type_in_words(inner)}, was given {value_in_words(given)}"
    if kind == "extra_forbidden":
        return unknown_key(schema, dotted)
    if kind == "missing":
        section, _, key = dotted.partition(".")
        if not key:
            return f"{section}: this section is missing; it needs {_required(schema, section)}"
        return f"{dotted}: missing; give it in the recipe or as --{dotted} ({_field(schema, dotted).description})"
    if len(location) == 1 or "." not in dotted:
        return f"{dotted}: expected a mapping of keys, was given {value_in_words(given)}"
    field = _field(schema, dotted)
    if kind == "value_error":
        return f"{dotted}: {finding['ctx']['error']}"
    if kind == "string_pattern_mismatch":
        return f"{dotted}: {given!r} is not of the form it takes. {field.description}"
    hint = ' (quote it to make it text: "...")' if kind == "string_type" and given is not None else ""
    if dotted == "algorithm.name" and str(given).lower() in BASELINES:
        hint = f"; examples/baselines/{str(given).lower()}.yaml has its settings"
    elif dotted == "algorithm.name" and str(given).lower() in ALGORITHMS:
        hint = f"; docs/options.md has the keys that make {given}"
    return f"{dotted}: expected {type_in_words(field)}, was given {value_in_words(given)}{hint}"


def _in_member(dotted: str, location: Sequence[str], member: type[Section], finding: Mapping[str, Any]) -> str:
    """A finding inside a mapping of sections: `location` is [name, key]."""
    given = finding["input"]
    if location[-1] == "[key]":
        return f"{dotted}: the name {given!r} must begin with a letter or digit, then letters, digits and `_ . + -`"
    where = f"{dotted}.{location[0]}"
    if len(location) == 1:
        return f"{where}: expected a mapping of {', '.join(member.model_fields)}, was given {value_in_words(given)}"
    field = member.model_fields.get(location[1])
    if field is None:
        keys = ", ".join(member.model_fields)
        return f"{where}.{location[1]}: unknown key; the keys of a set are {keys}"
    if finding["type"] == "missing":
        return f"{where}.{location[1]}: missing; a set needs {location[1]}"
    return f"{where}.{location[1]}: expected {type_in_words(field)}, was given {value_in_words(given)}"


def _field(schema: type[BaseModel], dotted: str) -> Any:
    section, _, key = dotted.partition(".")
    return section_schema(schema, section).model_fields[key]


def _required(schema: type[BaseModel], section: str) -> str:
    fields = section_schema(schema, section).model_fields
    return ", ".join(f"{section}.{key}" for key, field in fields.items() if field.is_required())

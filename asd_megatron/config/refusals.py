"""What a refused recipe says: the key, what was given, what is expected, the nearest valid key."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import BaseModel, ValidationError

from asd_megatron.config.base import section_schema, type_in_words, value_in_words

RENAMED_KEYS = {
    "rollout.receipt": "rollout.verify_weights",
    "rollout.receipt_tolerance": "rollout.verify_tolerance",
}
"""Keys of earlier versions, each with its new name."""


def dotted_keys(schema: type[BaseModel]) -> list[str]:
    """Every `section.key` of a recipe class, in order."""
    return [f"{name}.{key}" for name in schema.model_fields for key in section_schema(schema, name).model_fields]


def nearest_key(schema: type[BaseModel], dotted: str) -> str:
    """The valid key most like `dotted`: first in its own section, then the same key elsewhere, then over all keys."""
    keys = dotted_keys(schema)
    section, _, key = dotted.partition(".")
    if not key:  # a bare key or section: `--steps`, `algoritm:`
        same = [candidate for candidate in keys if candidate.partition(".")[2] == section]
        if same:
            return same[0]
        sections = difflib.get_close_matches(section, list(schema.model_fields), n=1, cutoff=0.6)
        if sections:
            return sections[0]
        key = section
    own = [candidate.partition(".")[2] for candidate in keys if candidate.startswith(f"{section}.")]
    close = difflib.get_close_matches(key, own, n=1, cutoff=0.7)
    if close:
        return f"{section}.{close[0]}"
    elsewhere = [candidate for candidate in keys if candidate.partition(".")[2] == key]
    if elsewhere:
        return difflib.get_close_matches(dotted, elsewhere, n=1, cutoff=0.0)[0]
    return difflib.get_close_matches(dotted, keys, n=1, cutoff=0.0)[0]


def unknown_key(schema: type[BaseModel], dotted: str) -> str:
    """`algorithm.lamda: unknown key; the nearest valid one is algorithm.lambda_max`."""
    if (new := RENAMED_KEYS.get(dotted)) in dotted_keys(schema):
        return f"{dotted}: this key is now called {new}"
    nearest = nearest_key(schema, dotted)
    if dotted in schema.model_fields:
        keys = ", ".join(f"{dotted}.{key}" for key in section_schema(schema, dotted).model_fields)
        return f"{dotted}: a section takes no value of its own; its keys: {keys}"
    kind = "key" if "." in dotted or "." in nearest else "section"
    return f"{dotted}: unknown {kind}; the nearest valid one is {nearest}"


def explain(error: ValidationError, schema: type[BaseModel]) -> str:
    """Pydantic's findings in the recipe's own terms; several stand one a line. Begins with a space or a new line."""
    lines: list[str] = []
    for finding in error.errors(include_url=False):
        line = _line(dict(finding), schema)
        if line not in lines:  # each member of a union reports
            lines.append(line)
    return f" {lines[0]}" if len(lines) == 1 else "".join(f"\n  {line}" for line in lines)


def _line(finding: dict[str, Any], schema: type[BaseModel]) -> str:
    location = [str(part) for part in finding["loc"]]
    dotted, kind, given = ".".join(location[:2]), finding["type"], finding["input"]
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
    if kind == "string_pattern_mismatch":
        return f"{dotted}: {given!r} is not of the form it takes. {field.description}"
    hint = ' (quote it to make it text: "...")' if kind == "string_type" and given is not None else ""
    return f"{dotted}: expected {type_in_words(field)}, was given {value_in_words(given)}{hint}"


def _field(schema: type[BaseModel], dotted: str) -> Any:
    section, _, key = dotted.partition(".")
    return section_schema(schema, section).model_fields[key]


def _required(schema: type[BaseModel], section: str) -> str:
    fields = section_schema(schema, section).model_fields
    return ", ".join(f"{section}.{key}" for key, field in fields.items() if field.is_required())

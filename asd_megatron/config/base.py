"""The base class of recipe sections (frozen, strict, no unknown keys), and the type of a key in words."""

from __future__ import annotations

import reprlib
import types
import warnings
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types as at
from pydantic import BaseModel, BeforeValidator, ConfigDict, StringConstraints
from pydantic.fields import FieldInfo

# `schema` is a key of recipes, and a deprecated method of pydantic's that nobody calls
warnings.filterwarnings("ignore", message='Field name "schema" in ', category=UserWarning)


class Section(BaseModel):
    """One section of a recipe; the class of the section `rollout` is called `RolloutSection`, and so on. A field's
    `description` is what the reference page and `--help` print of it."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        validate_default=True,
        allow_inf_nan=False,
        use_attribute_docstrings=False,
    )


def to_tuple(value: Any) -> Any:
    """YAML has lists only; other values are left to the type."""
    return tuple(value) if isinstance(value, list) else value


Text = Annotated[str, StringConstraints(min_length=1)]
TextList = Annotated[tuple[Text, ...], BeforeValidator(to_tuple)]
TokenId = Annotated[int, at.Ge(0)]
TokenIdList = Annotated[tuple[TokenId, ...], BeforeValidator(to_tuple)]

_NAMES: dict[Any, tuple[str, str]] = {
    bool: ("true or false", "true or false"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("text", "texts"),
}
_SHORT = reprlib.Repr()  # YAML aliases can make a short text a value of any size
_SHORT.maxstring = _SHORT.maxother = 200
_BOUNDS = ((at.Ge, "ge", ">="), (at.Gt, "gt", ">"), (at.Le, "le", "<="), (at.Lt, "lt", "<"))


def _unwrap(annotation: Any) -> tuple[Any, list[Any]]:
    """`Annotated[T, a, b]` -> (T, [a, b])."""
    if get_origin(annotation) is Annotated:
        inner, *notes = get_args(annotation)
        return inner, notes
    return annotation, []


def _bounds(notes: list[Any]) -> str:
    found = [
        f"{sign} {getattr(note, attribute)}"
        for note in notes
        for kind, attribute, sign in _BOUNDS
        if isinstance(note, kind)
    ]
    return (" " + " and ".join(found)) if found else ""


def _alternatives(annotation: Any, notes: list[Any]) -> list[tuple[Any, list[Any]]]:
    """The members of a union (one member if it is none), each with the notes that apply to it."""
    inner, own = _unwrap(annotation)
    if get_origin(inner) in (Union, types.UnionType):
        return [alternative for member in get_args(inner) for alternative in _alternatives(member, own + notes)]
    return [(inner, own + notes)]


def _in_words(inner: Any, notes: list[Any], plural: bool = False) -> str:
    if inner is type(None):
        return "null"
    origin = get_origin(inner)
    if origin is Literal:
        values = [str(value) for value in get_args(inner)]
        return values[0] if len(values) == 1 else f"one of {', '.join(values)}"
    if origin is tuple:
        element, element_notes = _unwrap(get_args(inner)[0])
        if isinstance(element, type) and issubclass(element, Section):
            return f"a list of mappings of {', '.join(element.model_fields)}"
        return f"a list of {_in_words(element, element_notes, plural=True)}"
    if origin is dict or inner is dict:
        return "a mapping"
    if isinstance(inner, type) and issubclass(inner, Section) and plural:
        return f"mappings of {', '.join(inner.model_fields)}"
    if isinstance(inner, type) and issubclass(inner, Section):
        keys = inner.model_fields
        kinds = {type_in_words(field) for field in keys.values()}
        each = f" ({'; '.join(sorted(kinds))} each)" if len(kinds) == 1 else ""
        return f"a mapping of {', '.join(keys)}{each}"
    name = _NAMES[inner][plural]
    return name + _bounds(notes)


def type_in_words(field: FieldInfo) -> str:
    """A field's type as a person reads it: `a whole number >= 1 or null`, `one of none, batch`, `a list of texts`."""
    members = _alternatives(field.annotation, list(field.metadata))
    return " or ".join(_in_words(inner, notes) for inner, notes in members)


def takes_text(field: FieldInfo) -> bool:
    """Whether the field holds free text (or null, or a list): then a command-line value needs no quotes inside the
    quotes, unless it begins as a list does."""
    members = {inner for inner, _ in _alternatives(field.annotation, [])} - {type(None)}
    return str in members and all(inner is str or get_origin(inner) is tuple for inner in members)


def takes_list(field: FieldInfo) -> bool:
    """Whether a list is a value of the field."""
    return any(get_origin(inner) is tuple for inner, _ in _alternatives(field.annotation, []))


def takes_null(field: FieldInfo) -> bool:
    """Whether null is a value of the field."""
    return any(inner is type(None) for inner, _ in _alternatives(field.annotation, []))


def value_in_words(value: Any) -> str:
    """What was given, with its kind: `'abc' (text)`, `3 (a whole number)`, `null`."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"{'true' if value else 'false'} (true or false)"
    if isinstance(value, dict):
        return f"{_SHORT.repr(value)} (a mapping)"
    if isinstance(value, BaseModel):
        return value_in_words(value.model_dump())
    if isinstance(value, list | tuple):
        return f"{_SHORT.repr(list(value))} (a list)"
    name = _NAMES.get(type(value), (type(value).__name__, ""))[0]
    return f"{value!r} ({name})"


def subsection(schema: type[BaseModel], key: str) -> type[Section] | None:
    """The class of a key of a section that has keys of its own; None for one that is a value."""
    field = schema.model_fields.get(key)
    annotation = None if field is None else field.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def member_section(schema: type[BaseModel], key: str) -> type[Section] | None:
    """The class of the values of a key that is a mapping of sections by name; None for any other key."""
    field = schema.model_fields.get(key)
    annotation = None if field is None else field.annotation
    if get_origin(annotation) is not dict:
        return None
    value = get_args(annotation)[1]
    return value if isinstance(value, type) and issubclass(value, Section) else None


def section_schema(schema: type[BaseModel], name: str) -> type[BaseModel]:
    """The class of a section; for an optional section (`Reward | None`) its class too."""
    annotation: Any = schema.model_fields[name].annotation
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    raise TypeError(f"{schema.__name__}.{name} is not a section")

"""Strict JSON, and the fields of a row: whatever is wrong is a LineError with the reason. `files` reads files.

Numbers keep the text they were written as (`as_written`), because an answer such as 6.02e23 is compared as text and
must not become the digits of the nearest double.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

from asd_megatron.errors import UserError

Line = dict[str, Any]
"""A row of a data file: its fields by name, with JSON values."""
MAX_DEPTH = 100  # nesting of lists and objects; far below Python's recursion limit, which later code would meet


class DataError(UserError, ValueError):
    """A data file is missing, empty, or has a line that cannot be used."""


class LineError(ValueError):
    """The reason why a line cannot be used; the reader adds the file and the line."""


class FrozenDict(dict[str, Any]):
    """A mapping that refuses changes and, unlike `types.MappingProxyType`, can be pickled to another rank."""

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("a problem's fields are read-only")

    __setitem__ = __delitem__ = __ior__ = _refuse
    update = setdefault = pop = popitem = clear = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return FrozenDict, (dict(self),)


class _WrittenInt(int):
    """A whole number of a JSON line with its text."""

    text: str


class _WrittenFloat(float):
    """Any other number of a JSON line with its text."""

    text: str


def _int(text: str) -> _WrittenInt:
    try:
        value = _WrittenInt(text)
    except ValueError as e:  # Python converts at most sys.get_int_max_str_digits() digits
        raise LineError(f"{text[:20]}... is too large a number ({len(text):,} digits); write it as text") from e
    value.text = text
    return value


def _float(text: str) -> _WrittenFloat:
    value = _WrittenFloat(text)
    if not math.isfinite(value):
        raise LineError(f"{text[:40]} is too large a number (beyond 1.8e308); write it as text")
    value.text = text
    return value


def as_written(number: int | float) -> str:
    """The text of a number that `parse_json` gave, exactly as in the file, but without a fraction of zeros alone:
    6.02e23 -> "6.02e23", 1.50 -> "1.50", 27.0 -> "27".
    """
    return re.sub(r"\.0+$", "", getattr(number, "text", str(number)))


def freeze(value: Any) -> Any:
    """A JSON value that cannot be changed: objects become `FrozenDict`, arrays become tuples, numbers plain ones."""
    if isinstance(value, dict):
        return FrozenDict({k: freeze(v) for k, v in value.items()})
    if isinstance(value, list):
        return tuple(freeze(v) for v in value)
    if isinstance(value, _WrittenInt):
        return int(value)
    return float(value) if isinstance(value, _WrittenFloat) else value


class IncompleteJson(LineError):
    """A text that ends inside its JSON value."""


def parse_json(data: bytes | str) -> Any:
    """The value of a JSON text, a line or a document. Raises LineError for what is not JSON or cannot be kept: a field
    given twice, numbers that are too large, more than MAX_DEPTH levels, half of a surrogate pair."""
    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise LineError(f"not UTF-8 text (byte {e.start + 1}): {e.reason}") from e
    try:
        value = json.loads(
            text, object_pairs_hook=_pairs, parse_constant=_no_constant, parse_int=_int, parse_float=_float
        )
    except json.JSONDecodeError as e:
        if e.pos >= len(text.rstrip()):
            raise IncompleteJson(f"not JSON: the text ends inside the object (column {e.colno}: {e.msg})") from e
        raise LineError(f"not JSON: {e.msg} at {f'line {e.lineno}, ' if e.lineno > 1 else ''}column {e.colno}") from e
    except RecursionError as e:
        raise LineError(_too_deep()) from e
    _check_nesting(value)
    if "\\u" in text:  # UTF-8 itself has no surrogates
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as e:
            raise LineError("holds half of a surrogate pair (\\ud800 to \\udfff), which is no character") from e
    return value


def _check_nesting(value: Any) -> None:
    """Refuse more than MAX_DEPTH levels, level by level: recursion would itself run out of stack."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        inner = (v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list))
        level = [v for values in inner for v in values]
        if not level:
            return
    raise LineError(_too_deep())


def _too_deep() -> str:
    return f"nested too deeply: lists and objects may stand in each other at most {MAX_DEPTH} deep"


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        names = [k for k, _ in pairs]
        raise LineError(f"the field {next(k for k in names if names.count(k) > 1)!r} is given twice")
    return out


def _no_constant(name: str) -> NoReturn:
    raise LineError(f"{name} is not JSON")


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    kinds = ((str, "text"), (bool, "a boolean"), (int | float, "a number"), (list, "a list"), (dict, "an object"))
    return next((name for kind, name in kinds if isinstance(value, kind)), "null")


def text_field(line: dict[str, Any], name: str) -> str | None:
    """The text of an optional field; absent and null are None. Empty or blank text and other types raise LineError."""
    text = optional_text_field(line, name)
    if text is None and line.get(name) is not None:
        raise LineError(f"`{name}` is empty")
    return text


def optional_text_field(line: dict[str, Any], name: str) -> str | None:
    """The text of a field that may be left blank: absent, null, empty and blank are None. Other types raise
    LineError.
    """
    value = line.get(name)
    if value is None:
        return None
    if not isinstance(value, str):
        raise LineError(f"`{name}` must be text, found {kind_of(value)}")
    return value if value.strip() else None


def scalar_field(line: dict[str, Any], name: str) -> str | None:
    """The stripped text of an optional field that holds text or a number; a number is `as_written`."""
    value = line.get(name)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return as_written(value)
    text = text_field(line, name)
    return None if text is None else text.strip()


def ends_with_user_turn(value: Any) -> bool:
    """Whether `value` looks like chat turns that ask something: a list whose last turn is the user's."""
    return isinstance(value, list) and bool(value) and isinstance(value[-1], dict) and value[-1].get("role") == "user"


def messages_field(line: dict[str, Any], name: str = "messages") -> tuple[FrozenDict, ...] | None:
    """Chat turns that end with a user turn: [{"role": "system" | "user" | "assistant", "content": text}, ...]."""
    value = line.get(name)
    if value is None:
        return None
    if not isinstance(value, list) or not value:
        raise LineError(f"`{name}` must be a list of turns that is not empty, found {kind_of(value)}")
    value = [_given(turn) for turn in value]
    for i, turn in enumerate(value):
        if not isinstance(turn, dict) or set(turn) != {"role", "content"}:
            raise LineError(f"turn {i + 1} of `{name}` must be an object with the fields `role` and `content` alone")
        if turn["role"] not in ("system", "user", "assistant"):
            raise LineError(f"turn {i + 1} of `{name}` has the role {turn['role']!r}; use system, user or assistant")
        if not isinstance(turn["content"], str):
            raise LineError(f"turn {i + 1} of `{name}` must have text as `content`, found {kind_of(turn['content'])}")
    if not ends_with_user_turn(value):
        raise LineError(
            f"the last turn of `{name}` must be a user turn, found {value[-1]['role']}: `{name}` is read as the"
            " prompt, so remove the response from it, or remove the field and give `prompt`"
        )
    return tuple(freeze(turn) for turn in value)


def _given(turn: Any) -> Any:
    """A turn without the fields that are null, which a row of Parquet has where another row has values."""
    named = ("role", "content")
    return {k: v for k, v in turn.items() if v is not None or k in named} if isinstance(turn, dict) else turn


def prompt_or_messages(line: dict[str, Any]) -> tuple[str | None, tuple[FrozenDict, ...] | None]:
    """Exactly one of the fields `prompt` and `messages`."""
    if isinstance(line.get("prompt"), list):
        raise LineError("`prompt` must be text, found a list: give chat turns as `messages`")
    prompt, messages = text_field(line, "prompt"), messages_field(line)
    if (prompt is None) == (messages is None):
        raise LineError("give `prompt` or `messages`, " + ("not both" if prompt else "found neither"))
    return prompt, messages

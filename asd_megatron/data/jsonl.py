"""Strict JSONL: one object a line; whatever is wrong is reported as `file:line: reason`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from asd_megatron.errors import UserError


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


def freeze(value: Any) -> Any:
    """A JSON value that cannot be changed: objects become `FrozenDict`, arrays become tuples."""
    if isinstance(value, dict):
        return FrozenDict({k: freeze(v) for k, v in value.items()})
    if isinstance(value, list):
        return tuple(freeze(v) for v in value)
    return value


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of every line that is not blank. Raises DataError; an empty file yields nothing."""
    path = Path(path)
    if path.is_dir():
        raise DataError(f"{path} is a folder: give the path of a JSONL file (one JSON object a line)")
    try:
        file = path.open("rb")
    except OSError as e:
        raise DataError(
            f"cannot read {path}: {e.strerror or e}. Give the path of a JSONL file (one JSON object a line)"
        ) from e
    with file:
        # split at b"\n" alone: JSON text may hold other line separators
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield number, _object(line)
            except LineError as e:
                raise DataError(f"{path}:{number}: {e}") from e


def _object(line: bytes) -> dict[str, Any]:
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise LineError(f"not UTF-8 text (byte {e.start + 1}): {e.reason}") from e
    try:
        value = json.loads(text, object_pairs_hook=_pairs, parse_constant=_no_constant)
    except json.JSONDecodeError as e:
        raise LineError(f"not JSON: {e.msg} at column {e.colno}") from e
    except RecursionError as e:
        raise LineError("not usable JSON: nested too deeply") from e
    if not isinstance(value, dict):
        raise LineError(f"expected a JSON object, found {_kind(value)}")
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as e:
        raise LineError("holds half of a surrogate pair (\\ud800 to \\udfff), which is no character") from e
    return value


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        names = [k for k, _ in pairs]
        raise LineError(f"the field {next(k for k in names if names.count(k) > 1)!r} is given twice")
    return out


def _no_constant(name: str) -> NoReturn:
    raise LineError(f"{name} is not JSON")


def _kind(value: Any) -> str:
    kinds = {str: "text", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return kinds.get(type(value), "null")


def text_field(line: dict[str, Any], name: str) -> str | None:
    """The text of an optional field; absent and null are None. Empty or blank text and other types raise LineError."""
    value = line.get(name)
    if value is None:
        return None
    if not isinstance(value, str):
        raise LineError(f"`{name}` must be text, found {_kind(value)}")
    if not value.strip():
        raise LineError(f"`{name}` is empty")
    return value


def messages_field(line: dict[str, Any], name: str = "messages") -> tuple[FrozenDict, ...] | None:
    """Chat turns that end with a user turn: [{"role": "system" | "user" | "assistant", "content": text}, ...]."""
    value = line.get(name)
    if value is None:
        return None
    if not isinstance(value, list) or not value:
        raise LineError(f"`{name}` must be a list of turns that is not empty, found {_kind(value)}")
    for i, turn in enumerate(value):
        if not isinstance(turn, dict) or set(turn) != {"role", "content"}:
            raise LineError(f"turn {i + 1} of `{name}` must be an object with the fields `role` and `content` alone")
        if turn["role"] not in ("system", "user", "assistant"):
            raise LineError(f"turn {i + 1} of `{name}` has the role {turn['role']!r}; use system, user or assistant")
        if not isinstance(turn["content"], str):
            raise LineError(f"turn {i + 1} of `{name}` must have text as `content`, found {_kind(turn['content'])}")
    if value[-1]["role"] != "user":
        raise LineError(f"the last turn of `{name}` must be a user turn, found {value[-1]['role']}")
    return tuple(freeze(turn) for turn in value)


def prompt_or_messages(line: dict[str, Any]) -> tuple[str | None, tuple[FrozenDict, ...] | None]:
    """Exactly one of the fields `prompt` and `messages`."""
    prompt, messages = text_field(line, "prompt"), messages_field(line)
    if (prompt is None) == (messages is None):
        raise LineError("give `prompt` or `messages`, " + ("not both" if prompt else "found neither"))
    return prompt, messages

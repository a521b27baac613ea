"""Strict JSONL: one object a line; whatever is wrong is reported as `file:line: reason`.

Numbers keep the text they were written as (`as_written`), because an answer such as 6.02e23 is compared as text and
must not become the digits of the nearest double.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from asd_megatron.errors import UserError, hub_hint

MAX_DEPTH = 100  # nesting of lists and objects; far below Python's recursion limit, which later code would meet
MAX_LINE_BYTES = 64 << 20
PEEKED = 4096  # bytes at the start of a file that tell what it is
TO_JSONL = {  # commands that convert the named kind of file
    "Parquet": (
        'python -c "import json, pyarrow.parquet as pq;'
        " [print(json.dumps(x, default=str)) for x in pq.read_table('FILE').to_pylist()]\" > FILE.jsonl"
    ),
    "a JSON array": "python -c \"import json; [print(json.dumps(x)) for x in json.load(open('FILE'))]\" > FILE.jsonl",
}
SIGNATURES = (
    (b"PAR1", "a Parquet file", f"convert it: {TO_JSONL['Parquet']}"),
    (b"ARROW1", "an Arrow file", "save the data set as JSONL: Dataset.to_json of the package datasets does"),
    (b"\x1f\x8b", "a gzip file", "unpack it: gunzip FILE"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard file", "unpack it: unzstd FILE"),
    (b"\xfd7zXZ\x00", "an xz file", "unpack it: unxz FILE"),
    (b"BZh", "a bzip2 file", "unpack it: bunzip2 FILE"),
    (b"PK\x03\x04", "a zip file", "unpack it: unzip FILE"),
    (b"\xff\xfe", "UTF-16 text", "convert it to UTF-8: iconv -f UTF-16 -t UTF-8 FILE > FILE.jsonl"),
    (b"\xfe\xff", "UTF-16 text", "convert it to UTF-8: iconv -f UTF-16 -t UTF-8 FILE > FILE.jsonl"),
    (b"version https://git-lfs", "a Git LFS pointer", "get the file itself: git lfs pull"),
)


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
    """The text of a number that `read_jsonl` gave, exactly as in the file, but without a fraction of zeros alone:
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


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of every line that is not blank. Raises DataError; an empty file yields nothing."""
    path = Path(path)
    if path.is_dir():
        raise DataError(f"{path} is a folder: give the path of a JSONL file (one JSON object a line)")
    try:
        file = path.open("rb")
        start = file.peek(PEEKED)[:PEEKED]
    except (OSError, ValueError) as e:  # ValueError: a null character in the name
        why = (e.strerror if isinstance(e, OSError) else None) or e
        raise DataError(
            f"cannot read {path}: {why}. Give the path of a JSONL file (one JSON object a line)"
            + hub_hint(path, " --repo-type dataset")
        ) from e
    with file:
        _check_kind(path, start)
        first = True
        # split at b"\n" alone: JSON text may hold other line separators
        for number, line in enumerate(iter(partial(file.readline, MAX_LINE_BYTES + 1), b""), start=1):
            if not line.strip():
                continue
            try:
                if len(line) > MAX_LINE_BYTES:
                    raise LineError(f"longer than {MAX_LINE_BYTES >> 20} MiB: shorten the problem, or split the line")
                value = _parse(line)
                if first and isinstance(value, list):
                    raise LineError(_array(path))
                if not isinstance(value, dict):
                    raise LineError(f"expected a JSON object, found {_kind(value)}")
            except _Incomplete as e:
                several = first and line.lstrip(b"\xef\xbb\xbf \t")[:1] in (b"[", b"{")
                raise DataError(f"{path}:{number}: {_array(path) if several else e}") from e
            except LineError as e:
                raise DataError(f"{path}:{number}: {e}") from e
            first = False
            yield number, value


def _check_kind(path: Path, start: bytes) -> None:
    """Refuse by name what is not text: `start` is the beginning of the file."""
    found = next(((kind, what) for signature, kind, what in SIGNATURES if start.startswith(signature)), None)
    if found is None and b"\x00" in start:
        found = ("a binary file", "convert it")
    if found is not None:
        kind, what = found
        what = what.replace("FILE", str(path))
        raise DataError(f"{path} is {kind}, not JSONL (UTF-8 text, one JSON object a line): {what}")


def _array(path: Path) -> str:
    command = TO_JSONL["a JSON array"].replace("FILE", str(path))
    return f"a JSON array or a JSON document over several lines, not JSONL (one object a line): convert it: {command}"


class _Incomplete(LineError):
    """A line that ends inside its JSON value."""


def _parse(line: bytes) -> Any:
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise LineError(f"not UTF-8 text (byte {e.start + 1}): {e.reason}") from e
    try:
        value = json.loads(
            text, object_pairs_hook=_pairs, parse_constant=_no_constant, parse_int=_int, parse_float=_float
        )
    except json.JSONDecodeError as e:
        if e.pos >= len(text.rstrip()):
            raise _Incomplete(f"not JSON: the line ends inside the object (column {e.colno}: {e.msg})") from e
        raise LineError(f"not JSON: {e.msg} at column {e.colno}") from e
    except RecursionError as e:
        raise LineError(_too_deep()) from e
    _check_nesting(value)
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


def _kind(value: Any) -> str:
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
        raise LineError(f"`{name}` must be text, found {_kind(value)}")
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
        raise LineError(f"`{name}` must be a list of turns that is not empty, found {_kind(value)}")
    for i, turn in enumerate(value):
        if not isinstance(turn, dict) or set(turn) != {"role", "content"}:
            raise LineError(f"turn {i + 1} of `{name}` must be an object with the fields `role` and `content` alone")
        if turn["role"] not in ("system", "user", "assistant"):
            raise LineError(f"turn {i + 1} of `{name}` has the role {turn['role']!r}; use system, user or assistant")
        if not isinstance(turn["content"], str):
            raise LineError(f"turn {i + 1} of `{name}` must have text as `content`, found {_kind(turn['content'])}")
    if not ends_with_user_turn(value):
        raise LineError(
            f"the last turn of `{name}` must be a user turn, found {value[-1]['role']}: `{name}` is read as the"
            " prompt, so remove the response from it, or remove the field and give `prompt`"
        )
    return tuple(freeze(turn) for turn in value)


def prompt_or_messages(line: dict[str, Any]) -> tuple[str | None, tuple[FrozenDict, ...] | None]:
    """Exactly one of the fields `prompt` and `messages`."""
    if isinstance(line.get("prompt"), list):
        raise LineError("`prompt` must be text, found a list: give chat turns as `messages`")
    prompt, messages = text_field(line, "prompt"), messages_field(line)
    if (prompt is None) == (messages is None):
        raise LineError("give `prompt` or `messages`, " + ("not both" if prompt else "found neither"))
    return prompt, messages

"""Comparing what a tested program has written or returned with what is expected. All of it is untrusted: no value is
compared by a method of the program's own, and the work is bounded by the size of what is expected."""

from __future__ import annotations

import json
import math
import re
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any

TOLERANCE = Fraction(1, 10**6)  # of numbers that are not integers, relative or absolute, whichever is larger
# `007` and `0101` are none: where leading zeros are printed they are part of the answer
NUMBER = re.compile(r"[-+]?(?:(?:0|[1-9]\d*)(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d{1,4})?", re.ASCII)
INTEGER = re.compile(r"[-+]?\d+", re.ASCII)


class Unreadable(Exception):
    """What the tested process sent is not what the supervisor's code sends."""


# ------------------------------------------------------------------ text


def same_output(output: str, expected: str) -> bool:
    """Whether two outputs are equal line by line. White space at the ends of lines and empty lines at the end do not
    count. In a line with numbers, the parts between white space are compared: equal text, or two numbers (`close`)
    without leading zeros."""
    lines, right = output.rstrip().split("\n"), expected.rstrip().split("\n")
    return len(lines) == len(right) and all(map(_same_line, lines, right))


def _same_line(line: str, expected: str) -> bool:
    if line.rstrip() == expected.rstrip():
        return True
    if len(line) > 2 * len(expected) + 1_000:
        return False
    parts, right = line.split(), expected.split()
    if len(parts) != len(right) or not any(NUMBER.fullmatch(part) for part in right):
        return False
    return all(a == b or _same_number_text(a, b) for a, b in zip(parts, right, strict=True))


def _same_number_text(a: str, expected: str) -> bool:
    if not (NUMBER.fullmatch(a) and NUMBER.fullmatch(expected)) or max(len(a), len(expected)) > 1_000:
        return False
    return close(Fraction(a), Fraction(expected), whole=INTEGER.fullmatch(expected) is not None)


def close(a: Fraction, expected: Fraction, *, whole: bool) -> bool:
    """Whether two numbers differ by at most TOLERANCE; relative to the larger one too, unless a `whole` number is
    expected: 1000000006.0 is not 1000000007."""
    scale = Fraction(1) if whole else max(Fraction(1), abs(a), abs(expected))
    return abs(a - expected) <= TOLERANCE * scale


# ------------------------------------------------------------------ values


def parsed(line: bytes) -> tuple[int, Any]:
    """(index, tagged value) of a line of the verdict channel (`supervisor.tagged`). Raises Unreadable."""
    index, _, value = line.partition(b" ")
    try:
        return int(index[:9]), json.loads(value)
    except (ValueError, RecursionError) as e:
        raise Unreadable(str(e)) from e


def same_value(tagged: Any, expected: Any, *, as_json: bool) -> bool:
    """Whether a tagged value is the expected one. As Python's == does (`as_json` False); or as JSON, which has lists
    alone and texts as keys, with TOLERANCE for numbers that are not integers."""
    try:
        return _same(tagged, expected, as_json)
    except (Unreadable, ValueError, TypeError, KeyError, IndexError, OverflowError, RecursionError, ArithmeticError):
        return False


def _same(tagged: Any, expected: Any, as_json: bool) -> bool:
    if expected is None or isinstance(expected, str):
        return type(tagged) is type(expected) and bool(tagged == expected)
    if isinstance(expected, int | float | complex):  # Booleans too
        return _same_number(_number(tagged), expected, as_json)
    kind, items = _kind(tagged)
    if isinstance(expected, bytes):
        return kind == "bytes" and bytes.fromhex(items[0]) == expected
    if len(items) != len(expected):
        return False
    if isinstance(expected, list | tuple):
        kinds = ("list", "tuple") if as_json else ("list",) if isinstance(expected, list) else ("tuple",)
        return kind in kinds and all(_same(a, b, as_json) for a, b in zip(items, expected, strict=True))
    if isinstance(expected, dict):
        pairs = [(_json_key(k) if as_json else _decoded(k), v) for k, v in items]
        distinct = len({k for k, _ in pairs}) == len(expected)
        return kind == "dict" and distinct and all(k in expected and _same(v, expected[k], as_json) for k, v in pairs)
    return kind == "set" and {_decoded(item) for item in items} == expected


def _kind(tagged: Any) -> tuple[str, list[Any]]:
    if not (isinstance(tagged, list) and tagged and isinstance(tagged[0], str)):
        raise Unreadable("a scalar where a container is expected")
    return tagged[0], tagged[1:]


def _number(tagged: Any) -> Any:
    if isinstance(tagged, bool):
        return tagged
    kind, items = _kind(tagged)
    if kind == "int":
        return int(items[0], 16)
    if kind == "float":
        return float(items[0])
    if kind == "complex":
        return complex(float(items[0]), float(items[1]))
    if kind == "fraction":
        return Fraction(int(items[0], 16), int(items[1], 16))
    if kind == "decimal":
        try:
            return Decimal(items[0][:10_000])
        except InvalidOperation as e:
            raise Unreadable("no decimal number") from e
    raise Unreadable(f"{kind} where a number is expected")


def _same_number(value: Any, expected: Any, as_json: bool) -> bool:
    if not as_json or isinstance(value, int) and isinstance(expected, int):
        return bool(value == expected)
    a, b = float(value), float(expected)
    if not (math.isfinite(a) and math.isfinite(b)):
        return a == b or math.isnan(a) and math.isnan(b)
    whole = isinstance(expected, int)
    return close(Fraction(a), Fraction(expected if whole else b), whole=whole)


def _decoded(tagged: Any) -> Any:
    """A hashable value: an element of a set or a key."""
    if tagged is None or isinstance(tagged, str):
        return tagged
    kind, items = ("", []) if isinstance(tagged, bool) else _kind(tagged)
    if kind == "bytes":
        return bytes.fromhex(items[0])
    if kind == "tuple":
        return tuple(map(_decoded, items))
    if kind == "set":
        return frozenset(map(_decoded, items))
    return _number(tagged)


def _json_key(tagged: Any) -> str:
    """A key as JSON writes it."""
    value = _decoded(tagged)
    return value if isinstance(value, str) else json.dumps(value)

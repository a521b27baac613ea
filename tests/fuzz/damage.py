"""Damaged files, as hypothesis strategies: of bytes, of JSON values, of safetensors files."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import struct
from typing import Any

from hypothesis import strategies as st

STRANGE: list[Any] = [
    *(None, True, False, 0, 1, -1, 3, 2**31, -(2**31), 2**63, 2**70, 10**400, 0.5, -0.0, 1e-9, 1e30, 1e308),
    *(float("nan"), float("inf"), "", " ", "auto", "1", "nan", "\x00", "\ud800", "é" * 50, "x" * 100_000),
    *("a/b", "../x", "/etc/passwd", "/dev/zero", "{prompt}", "{{ x }}", [], [1], [None], ["a", "b"], [[]], {}),
    *({"a": 1}, {"": None}, {"type": "x"}, [0] * 1000),
]
WORDS = (
    *(b"\x00" * 8, b"\xff" * 8, b"\xff\xff\xff\x7f", b"\x80\x04", b"\x00", b"PK\x03\x04", b"PAR1", b"\xef\xbb\xbf"),
    *(b"{", b"}", b"[", b"]", b'"', b"\n", b":", b"- ", b"1e999", b"-1", b"&a *a", b"!!python/object:os.system "),
)


@st.composite
def damaged_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """`data` after one to four changes: bytes replaced, removed, inserted, repeated, the end cut off."""
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        length = draw(st.sampled_from((1, 1, 2, 8, 64, 512)))
        match draw(st.sampled_from(("flip", "word", "remove", "insert", "repeat", "cut"))):
            case "flip":
                bit = 1 << draw(st.integers(0, 7))
                data = data[:at] + bytes(byte ^ bit for byte in data[at : at + 1]) + data[at + 1 :]
            case "word":
                word = draw(st.sampled_from(WORDS))
                data = data[:at] + word + data[at + len(word) :]
            case "remove":
                data = data[:at] + data[at + length :]
            case "insert":
                data = (
                    data[:at] + draw(st.one_of(st.sampled_from(WORDS), st.binary(min_size=1, max_size=16))) + data[at:]
                )
            case "repeat":
                data = data[: at + length] + data[at:]
            case _:
                data = data[:at]
    return data


def _places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [found for key in keys for found in [(*place, key), *_places(value[key], (*place, key))]]


@st.composite
def damaged_value(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value after one to three changes: an inner value replaced, removed, renamed, wrapped or moved."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        places = _places(value)
        if not places:
            return draw(st.sampled_from(STRANGE))
        place = draw(st.sampled_from(places))
        outer = value
        for key in place[:-1]:
            outer = outer[key]
        key = place[-1]
        match draw(st.sampled_from(("replace", "replace", "near", "remove", "rename", "wrap", "exchange"))):
            case "replace":
                outer[key] = copy.deepcopy(draw(st.sampled_from(STRANGE)))
            case "near" if isinstance(outer[key], int | float) and abs(outer[key]) < 1e300:
                outer[key] = outer[key] * draw(st.sampled_from((-1, 0, 2, 7, 0.5, 1000))) + draw(st.integers(-1, 1))
            case "remove":
                del outer[key]
            case "rename" if isinstance(outer, dict):
                outer[
                    draw(st.sampled_from(("x", f"{key}s", f"{key}"[1:], key.upper() if isinstance(key, str) else "k")))
                ] = outer.pop(key)
            case "wrap":
                outer[key] = draw(st.sampled_from(([outer[key]], {"x": outer[key]}, f"{outer[key]}")))
            case _:
                other = draw(st.sampled_from(places))
                moved = value
                for step in other:
                    moved = (
                        moved[step]
                        if isinstance(moved, dict)
                        and step in moved
                        or isinstance(moved, list)
                        and isinstance(step, int)
                        and step < len(moved)
                        else None
                    )
                outer[key] = copy.deepcopy(moved)
    return value


def as_json(value: Any) -> bytes:
    return json.dumps(value, default=str).encode()


@st.composite
def damaged_json(draw: st.DrawFn, value: Any) -> bytes:
    """The text of a JSON value, damaged as a value or as bytes."""
    if draw(st.booleans()):
        return as_json(draw(damaged_value(value)))
    return draw(damaged_bytes(as_json(value)))


@st.composite
def damaged_safetensors(draw: st.DrawFn, data: bytes) -> bytes:
    """A safetensors file with a damaged header, a wrong header length, or damaged anywhere."""
    (length,) = struct.unpack("<Q", data[:8])
    kind = draw(st.sampled_from(("header", "header", "length", "bytes")))
    if kind == "bytes":
        return draw(damaged_bytes(data))
    if kind == "length":
        return (
            struct.pack("<Q", draw(st.sampled_from((0, 1, length - 1, length + 1, 2**20, 2**32, 2**62, 2**64 - 1))))
            + data[8:]
        )
    header = as_json(draw(damaged_value(json.loads(data[8 : 8 + length]))))
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def _fields(value: Any, seen: set[int], depth: int = 0) -> list[tuple[Any, Any]]:
    """(container, key or attribute) of everything in a graph of dicts, lists and dataclasses."""
    if id(value) in seen or depth > 8:
        return []
    seen.add(id(value))
    if isinstance(value, dict):
        keys: list[Any] = list(value)[:50]
    elif isinstance(value, list):
        keys = list(range(len(value)))[:50]
    elif dataclasses.is_dataclass(value):
        keys = [field.name for field in dataclasses.fields(value)]
    else:
        return []
    found = []
    for key in keys:
        inner = getattr(value, key, None) if isinstance(key, str) and dataclasses.is_dataclass(value) else value[key]
        found += [(value, key), *_fields(inner, seen, depth + 1)]
    return found


@st.composite
def damaged_pickle(draw: st.DrawFn, data: bytes) -> bytes:
    """A pickle of dataclasses and containers with one to three values replaced by strange or neighbouring ones."""
    value = pickle.loads(data)
    places = _fields(value, set())
    for _ in range(draw(st.integers(1, 3))):
        container, key = draw(st.sampled_from(places))
        other, name = draw(st.sampled_from(places))
        plain = isinstance(container, dict | list)
        old = (
            container.get(key)
            if isinstance(container, dict)
            else container[key]
            if plain
            else getattr(container, key, None)
        )
        if isinstance(old, int) and draw(st.booleans()):
            new = old + draw(st.sampled_from((-1, 1, 2**20, -(2**40), 2**62)))
        elif draw(st.booleans()):
            new = copy.copy(draw(st.sampled_from(STRANGE)))
        else:
            new = (
                other.get(name)
                if isinstance(other, dict)
                else other[name]
                if isinstance(other, list)
                else getattr(other, name, None)
            )
        if plain:
            container[key] = new
        else:
            object.__setattr__(container, key, new)
    try:
        return pickle.dumps(value)
    except Exception:  # a cycle through a key
        return data[:-1]

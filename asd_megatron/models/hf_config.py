"""Checked reading of single values of a Hugging Face `config.json`: wrong kinds and sizes are refused by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn

from asd_megatron.errors import UserError


def required(config: Mapping[str, Any], key: str) -> Any:
    """The value of a key that must be given. Raises UserError when it is absent or null."""
    if config.get(key) is None:
        raise UserError(f"config.json has no `{key}`: the model folder is incomplete, or of another architecture")
    return config[key]


def whole_number(config: Mapping[str, Any], key: str, most: int) -> int:
    """A whole number from 1 to `most`, which must be given."""
    value = required(config, key)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        _refuse(key, value, f"a whole number from 1 to {most:,}")
    return value


def number(config: Mapping[str, Any], key: str, default: float, *, zero: bool = False) -> float:
    """A finite number above 0 (`zero`: or 0); absent and null are `default`."""
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool) or abs(value) > 1e30 or not math.isfinite(value):
        _refuse(key, value, "a number")
    if value < 0 or value == 0 and not zero:
        _refuse(key, value, "a number of 0 or more" if zero else "a number above 0")
    return float(value)


def flag(config: Mapping[str, Any], key: str) -> bool:
    """true or false; absent and null are false."""
    value = config.get(key)
    if not isinstance(value, bool | None):
        _refuse(key, value, "true or false")
    return bool(value)


def shown(value: Any) -> str:
    """A value in at most 60 characters, for messages."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number with more digits than Python prints, lists in lists
        return "a value too large to print"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _refuse(key: str, value: Any, expected: str) -> NoReturn:
    raise UserError(
        f"config.json: {key} is {shown(value)}, expected {expected}: the file is damaged, or of a model that is not"
        " supported; download the model again"
    )

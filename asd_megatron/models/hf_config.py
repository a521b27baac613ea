"""Checked reading of a Hugging Face `config.json`: everything that is wrong with it is named in one error."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from asd_megatron.errors import UserError

MOST_POSITIONS = (1 << 31) - 1
"""The largest position, window or length that is believed."""

DAMAGED = ": the file is damaged, or of a model that is not supported; download the model again"

log = logging.getLogger("asd_megatron")


class Fields:
    """The fields of a config, read one by one; what is wrong with them is collected, and raised by `finish`.

    A reading method that refuses a value returns a placeholder (the least number, the default, false), so that the
    other fields are read too. A check that relates fields asks `good` first, or it would refuse the placeholder.

    Args:
        config: the object of `config.json`, or one inside it.
        path: names the inner object, with a dot at the end: `rope_scaling.`.
        outer: what an inner object reports its problems to.
    """

    def __init__(self, config: Mapping[str, Any], path: str = "", outer: Fields | None = None) -> None:
        self._config = config
        self._path = path
        self._problems: list[str] = [] if outer is None else outer._problems
        self._read: set[str] = set()
        self._bad: set[str] = set()

    @property
    def name(self) -> str:
        """What an inner object is called: `rope_scaling`."""
        return self._path.removesuffix(".")

    def has(self, key: str) -> bool:
        """Whether the key is there, even with null. Counts as reading it."""
        self._read.add(key)
        return key in self._config

    def get(self, key: str, default: Any = None) -> Any:
        """The value as it is; `default` when it is absent or null."""
        self._read.add(key)
        value = self._config.get(key)
        return default if value is None else value

    def required(self, key: str) -> Any:
        """The value of a key that must be given; None, and a problem, when it is absent or null."""
        value = self.get(key)
        if value is None:
            self._bad.add(key)
            self.problem(
                f"config.json has no `{self._path}{key}`: the model folder is incomplete, or of another architecture"
            )
        return value

    def whole_number(self, key: str, most: int, *, least: int = 1, default: int | None = None) -> int:
        """A whole number from `least` to `most`; without a default it must be given."""
        value = self.required(key) if default is None else self.get(key, default)
        if key in self._bad:
            return least
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            self.refuse(key, f"a whole number from {least} to {most:,}")
            return least
        return value

    def number(self, key: str, default: float, *, zero: bool = False) -> float:
        """A finite number above 0 (`zero`: or 0)."""
        value = self.get(key, default)
        finite = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e30
        if not finite or not math.isfinite(value):
            self.refuse(key, "a number")
        elif value < 0 or value == 0 and not zero:
            self.refuse(key, "a number of 0 or more" if zero else "a number above 0")
        else:
            return float(value)
        return default

    def flag(self, key: str, default: bool = False) -> bool:
        """true or false."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            self.refuse(key, "true or false")
            return default
        return value

    def inside(self, key: str) -> Fields:
        """The fields of an object, which is empty when it is absent or null."""
        value = self.get(key, {})
        if not isinstance(value, Mapping):
            self.refuse(key, "an object")
            value = {}
        return Fields(value, f"{self._path}{key}.", self)

    def laid_over(self, below: Mapping[str, Any]) -> Fields:
        """These fields, and those of `below` that they do not have."""
        return Fields({**below, **self._config}, self._path, self)

    def good(self, *keys: str) -> bool:
        """Whether none of the keys was refused."""
        return not self._bad & set(keys)

    def values(self) -> Mapping[str, Any]:
        """All values as they are."""
        return self._config

    def given(self) -> tuple[str, ...]:
        """The keys whose values are not null."""
        return tuple(key for key, value in self._config.items() if value is not None)

    def unread(self) -> tuple[str, ...]:
        """The keys with a value that no method has read."""
        return tuple(key for key in self.given() if key not in self._read)

    def refuse(self, key: str, expected: str) -> None:
        """Add the problem that a value is not what is expected."""
        self._bad.add(key)
        self.problem(f"config.json: {self._path}{key} is {shown(self._config.get(key))}, expected {expected}{DAMAGED}")

    def unsupported(self, key: str, why: str) -> None:
        """Add the problem that a value asks for something that is not supported."""
        self._bad.add(key)
        self.problem(f"config.json: {self._path}{key} is {shown(self._config.get(key))}; {why}")

    def problem(self, text: str) -> None:
        """Add a complete message."""
        if text not in self._problems:
            self._problems.append(text)

    def finish(self) -> None:
        """Raise UserError if there are problems: the only one, or all of them, one a line."""
        if len(self._problems) == 1:
            raise UserError(self._problems[0])
        if self._problems:
            lines = "".join(f"\n  {problem.removeprefix('config.json: ')}" for problem in self._problems)
            raise UserError(f"config.json cannot be used:{lines}")


@cache
def warn_once(text: str) -> None:
    """Log a warning the first time it is given: a config is translated in several places of a run."""
    log.warning("%s", text)


def shown(value: Any) -> str:
    """A value in at most 60 characters, for messages."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number with more digits than Python prints, lists in lists
        return "a value too large to print"
    return text if len(text) <= 60 else f"{text[:57]}..."


def listed(names: Iterable[str]) -> str:
    """`a, b and c`."""
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last

"""How a metric is declared: its name, unit and meaning, in sections."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One metric. A part of `name` in angle brackets stands for any word (`puzzle/u_<class>`)."""

    name: str
    unit: str
    meaning: str

    def matches(self, name: str) -> bool:
        pattern = "".join(
            r"[^/]+" if part.startswith("<") else re.escape(part) for part in re.split(r"(<[^>]+>)", self.name)
        )
        return re.fullmatch(pattern, name) is not None


@dataclass(frozen=True)
class Section:
    """Metrics that belong together; `when` says which steps have them."""

    title: str
    when: str
    metrics: tuple[Metric, ...]

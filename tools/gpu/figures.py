"""Figures of a row, read from the report that its command wrote."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Figures:
    """values: by name, for the table. skipped: why nothing was checked; None if something was."""

    values: Mapping[str, Any] = field(default_factory=dict)
    skipped: str | None = None


def of_tests(path: Path) -> Figures:
    """From pytest's JUnit report: how many tests passed, and the properties that they recorded."""
    cases = list(ElementTree.parse(path).getroot().iter("testcase"))  # noqa: S314 (pytest wrote it)
    outcomes = {
        kind: [case for case in cases if case.find(kind) is not None] for kind in ("skipped", "failure", "error")
    }
    failed = len(outcomes["failure"]) + len(outcomes["error"])
    values: dict[str, Any] = {"passed": len(cases) - len(outcomes["skipped"]) - failed}
    for kind, found in (("failed", failed), ("skipped", len(outcomes["skipped"]))):
        if found:
            values[kind] = found
    for entry in (entry for case in cases for entry in case.iter("property")):
        values[entry.attrib["name"]] = _number(entry.attrib["value"])
    reasons = [case.find("skipped").attrib.get("message", "") for case in outcomes["skipped"]]  # type: ignore[union-attr]
    nothing = bool(cases) and len(outcomes["skipped"]) == len(cases)
    return Figures(values, reasons[0] if nothing else None)


def of_parity(path: Path) -> Figures:
    """The number of layouts, and the largest errors with their layout."""
    cells = json.loads(path.read_text())["cells"]
    values: dict[str, Any] = {"layouts": len(cells)}
    for key, name in (("max_relative_error", "largest error"), ("update_error", "of updates")):
        known = [cell for cell in cells if cell[key] is not None]
        if known:
            worst = max(known, key=lambda cell: float(cell[key]))
            values[name] = f"{worst[key]:.1e} ({worst['layout']})"
    return Figures(values)


def of_update(path: Path) -> Figures:
    return Figures(json.loads(path.read_text())["figures"])


def of_head(path: Path) -> Figures:
    """For each implementation of the head, its time relative to the bare matrix products and its memory relative to
    the logits."""
    report = json.loads(path.read_text())
    heads = [name for name in ("fused", "divergence", "materialised") if name in report["ways"]]
    times = {f"{name}: time": report[name]["time_over_floor"] for name in heads}
    return Figures(times | {f"{name}: memory": report[name]["memory_over_2tv"] for name in heads})


def text(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items()
    )


def _number(value: str) -> Any:
    try:
        return float(value)
    except ValueError:
        return value

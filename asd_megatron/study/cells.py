"""What a cell's folder says: `cell.json`, and whether what was run is what the study asks for now."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from asd_megatron.config import make_recipe, recipe_hash
from asd_megatron.errors import UserError
from asd_megatron.files import write_json
from asd_megatron.study.plan import Cell

CELL_FILE, LOG_FILE = "cell.json", "log.txt"
LOG_LINES = 20  # of a failed cell, kept in its record
Status = Literal["running", "finished", "failed", "interrupted"]


@dataclass(frozen=True)
class CellRecord:
    """`cell.json`. Times are UTC in ISO 8601; `seconds` is wall-clock, starting the program included."""

    arm: str
    start: str
    seed: int
    status: Status
    recipe_hash: str
    overrides: Mapping[str, Any]
    recipe: Mapping[str, Any]
    command: Sequence[str]
    version: str
    threads: int  # of each rank
    parallel: int  # cells at a time, then
    started: str
    ended: str | None = None
    seconds: float | None = None
    cpu_seconds: float | None = None  # user and system, of the cell's processes
    exit_status: int | None = None
    log_tail: Sequence[str] = ()


def write_record(folder: Path, record: CellRecord) -> None:
    write_json(folder / CELL_FILE, vars(record))


def read_record(folder: Path) -> CellRecord | None:
    """The record of a cell's folder; None if it has none. Raises UserError for a file that is none of ours."""
    path = folder / CELL_FILE
    if not path.is_file():
        return None
    try:
        return CellRecord(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is not a cell's record ({error}): remove {folder} to run the cell again") from None


def changed_keys(cell: Cell, record: CellRecord) -> list[str]:
    """How the cell's recipe differs from the recorded one, as `gate.tau_down: 0.93 -> 0.9`; [] if it is the same.

    Keys that the recipe schema has gained since then count with their defaults, so that a new version of this package
    continues old studies.
    """
    if cell.hash == record.recipe_hash:
        return []
    try:
        before = make_recipe(record.recipe, source=f"{cell.folder / CELL_FILE}")
    except UserError as error:
        return [f"the recorded recipe is no longer a recipe ({error})"]
    if recipe_hash(before) == cell.hash:
        return []
    old, new = before.model_dump(mode="json"), cell.recipe.model_dump(mode="json")
    return [
        f"{section}.{key}: {old[section][key]!r} -> {value!r}"
        for section, keys in new.items()
        for key, value in keys.items()
        if old[section][key] != value
    ]


def check_unchanged(cell: Cell) -> CellRecord | None:
    """The cell's record, if it has run. Raises UserError if another recipe was run there."""
    record = read_record(cell.folder)
    if record is None:
        return None
    changed = changed_keys(cell, record)
    if changed:
        raise UserError(
            f"cell {cell.key} was run with another recipe ({'; '.join(changed[:5])}): change the study file back, give "
            f"the study another `name`, or remove {cell.folder} to run the cell again"
        )
    return record


def log_tail(folder: Path, lines: int = LOG_LINES) -> tuple[str, ...]:
    """The last lines of the cell's log that are not empty."""
    try:
        text = (folder / LOG_FILE).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ()
    return tuple([line for line in text.splitlines() if line.strip()][-lines:])

"""RUN/history.jsonl: the events of a run over all its starts, one JSON line each."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from asd_megatron.files import ends_torn, to_json, utc_now

HISTORY_FILE = "history.jsonl"


def record(folder: Path, event: str, step: int, **values: Any) -> None:
    """Append an event after `step` steps to RUN/history.jsonl: a start (its kind; `returned` if `checkpoint.resume`
    named the run's own checkpoint), before it a `fallback` for each damaged checkpoint that it passed over, a `change`
    of a recipe key, a `save_failed`, a `stop` on request, the `end`."""
    line = {"time_utc": utc_now(), "event": event, "step": step, **values}
    with (folder / HISTORY_FILE).open("ab+") as file:
        file.write(b"\n" * ends_torn(file) + to_json(line).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_history(folder: Path) -> list[dict[str, Any]]:
    """The events of RUN/history.jsonl; a line that a kill tore, or that is damaged otherwise, is skipped."""
    events = []
    with suppress(FileNotFoundError):
        for line in (folder / HISTORY_FILE).read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError, RecursionError):
                event = json.loads(line)
                if isinstance(event, dict):
                    events.append(event)
    return events


def changes_of(folder: Path) -> list[dict[str, Any]]:
    """The settings that changed in the middle of a run, for its summary: step, key, old, new."""
    found = [event for event in read_history(folder) if event.get("event") == "change" and event.get("step")]
    return [{name: event.get(name) for name in ("step", "key", "old", "new")} for event in found]

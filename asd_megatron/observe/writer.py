"""`metrics.jsonl` and TensorBoard, with the same names. Rank 0 only."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from asd_megatron.errors import UserError
from asd_megatron.files import atomic_write, to_json, utc_now

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


def read_metrics(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of RUN/metrics.jsonl as dicts, in order of steps; null is None.

    A last line without its newline was torn by a kill (or is being written) and is left out. Raises UserError for a
    missing file and for any other line that is not one JSON object with a `step`.
    """
    path = Path(folder) / METRICS_FILE
    if not path.is_file():
        raise UserError(f"{path} does not exist: give the folder of a run that has made at least one step")
    return read_lines(path)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """As `read_metrics`, of any file that has one JSON object a step."""
    lines = path.read_text(encoding="utf-8").split("\n")
    rows = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: not a JSON object ({error}); remove the line") from error
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise UserError(f"{path}:{number}: no whole number `step` in the line; remove the line")
        rows.append(row)
    return rows


def _summary(metrics: Mapping[str, float]) -> Any:
    """All scalars in one record: one call each would take longer than a small model's update."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    finite = ((name, value) for name, value in metrics.items() if math.isfinite(value))
    return Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in finite])


class RunWriter:
    """Appends one line a step to RUN/metrics.jsonl, flushed, and the same numbers to TensorBoard.

    `resume_step` None starts new files: an older metrics.jsonl and event files in the folder are removed. Resuming from
    the state after step s keeps the lines up to s and drops later ones atomically; TensorBoard hides its later points.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, tensorboard: bool = True, resume_step: int | None = None
    ) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / METRICS_FILE
        kept: list[dict[str, Any]] = []
        if resume_step is not None and path.is_file():
            kept = [row for row in read_metrics(folder) if row["step"] <= resume_step]
        atomic_write(path, "".join(to_json(row) + "\n" for row in kept))
        self._last_step = kept[-1]["step"] if kept else -1
        self._lines = path.open("a", encoding="utf-8")
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            board = self.folder / TENSORBOARD_FOLDER
            if resume_step is None:
                for old in board.glob("events.out.tfevents.*"):
                    old.unlink()
            purge = None if resume_step is None else resume_step + 1
            self._board = SummaryWriter(str(board), purge_step=purge)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log one step's numbers; non-finite ones become null. Steps must rise: raises ValueError otherwise."""
        if step <= self._last_step:
            raise ValueError(f"step {step} after step {self._last_step}: one object a step, in order")
        self._last_step = step
        line = {"step": step, "time_utc": utc_now(), **metrics}
        self._lines.write(to_json(line) + "\n")
        self._lines.flush()
        if self._board is not None:
            self._board.file_writer.add_summary(_summary(metrics), step)
            self._board.flush()

    def text(self, name: str, text: str, step: int = 0) -> None:
        """Show `text` verbatim in TensorBoard (the resolved recipe, the start-up report)."""
        if self._board is not None:
            self._board.add_text(name, "\n".join("    " + line for line in text.splitlines()), step)
            self._board.flush()

    def close(self) -> None:
        self._lines.close()
        if self._board is not None:
            self._board.close()
            self._board = None

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

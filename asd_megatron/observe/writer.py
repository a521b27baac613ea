"""`metrics.jsonl` and TensorBoard, with the same names. Rank 0 only."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from asd_megatron.errors import UserError
from asd_megatron.files import system_reason, utc_now
from asd_megatron.observe.lines import LineFile, read_lines

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


def read_metrics(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of RUN/metrics.jsonl as dicts (`lines.read_lines`). Raises UserError for a missing file too."""
    path = Path(folder) / METRICS_FILE
    if not path.is_file():
        raise UserError(f"{path} does not exist: give the folder of a run that has made at least one step")
    return read_lines(path)


def _summary(metrics: Mapping[str, float]) -> Any:
    """All scalars in one record: one call each would take longer than a small model's update."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    finite = ((name, value) for name, value in metrics.items() if math.isfinite(value))
    return Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in finite])


@contextmanager
def quiet_writer() -> Iterator[None]:
    """Inside, TensorBoard's thread prints no traceback for an error, which it hands over as well."""
    before = threading.excepthook

    def hook(arguments: Any) -> None:
        if type(arguments.thread).__module__.partition(".")[0] != "tensorboard":
            before(arguments)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


class RunWriter:
    """Appends one line a step to RUN/metrics.jsonl, and the same numbers to TensorBoard.

    `resume_step` None starts new files: an older metrics.jsonl and event files in the folder are removed. Resuming from
    the state after step s keeps the lines up to s and drops later ones atomically; TensorBoard hides its later points.
    Lines wait in memory while the disk is full (`LineFile`). TensorBoard's files, which hold the same numbers, are
    given up until the next start when one cannot be written.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, tensorboard: bool = True, resume_step: int | None = None
    ) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lines = LineFile(self.folder / METRICS_FILE, resume_step=resume_step)
        self._last_step = self._lines.last_step
        self._board: Any = None
        self._given_up = False
        self._notes: list[str] = []
        if tensorboard:
            self._on_board(lambda: self._open_board(resume_step))

    def _open_board(self, resume_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        board = self.folder / TENSORBOARD_FOLDER
        if resume_step is None:
            for old in board.glob("events.out.tfevents.*"):
                old.unlink()
        self._board = SummaryWriter(str(board), purge_step=None if resume_step is None else resume_step + 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """Log one step's numbers; non-finite ones become null. Steps must rise: raises ValueError otherwise. Returns
        messages for the console about what could not be written. Raises OSError as `LineFile.write`."""
        if step <= self._last_step:
            raise ValueError(f"step {step} after step {self._last_step}: one object a step, in order")
        self._last_step = step
        waiting = {"files/waiting_lines": float(self._lines.waiting)} if self._lines.waiting else {}
        board = {"files/tensorboard_dropped": 1.0} if self._given_up else {}
        row = {"step": step, "time_utc": utc_now(), **metrics, **waiting, **board}
        note = self._lines.write(row)
        if self._board is not None:
            self._on_board(lambda: self._board.file_writer.add_summary(_summary(metrics), step))
        notes, self._notes = [*([note] if note else []), *self._notes], []
        return notes

    def write_waiting(self) -> None:
        """Write the lines that wait for room. Raises OSError when they cannot be written."""
        self._lines.write_waiting()

    def text(self, name: str, text: str, step: int = 0) -> None:
        """Show `text` verbatim in TensorBoard (the resolved recipe, the start-up report)."""
        if self._board is not None:
            indented = "\n".join("    " + line for line in text.splitlines())
            self._on_board(lambda: self._board.add_text(name, indented, step))

    def _on_board(self, action: Callable[[], Any]) -> None:
        """Write to TensorBoard's files, or give them up with a note."""
        try:
            with quiet_writer():
                action()
                self._board.flush()
        except Exception as error:  # its thread hands over whatever it met, and later that it is closed
            reason = system_reason(error) if isinstance(error, OSError) else str(error)
            self._board, self._given_up = None, True
            self._notes.append(
                f"warning: TensorBoard's files cannot be written ({reason}): they end here until the next start;"
                f" {METRICS_FILE} has all numbers"
            )

    def close(self) -> None:
        """Raises OSError for lines that still wait and cannot be written."""
        if self._board is not None:
            board, self._board = self._board, None
            with suppress(Exception), quiet_writer():
                board.close()
        self._lines.close()

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

"""Files that get one JSON line a step: metrics.jsonl and expert_load.jsonl. Global rank 0 only.

A line that the disk has no room for waits in memory, with all that come after it, and is written before the next one as
soon as there is room. No line is lost or torn: what a refused write has left of one is cut off again. Any other refusal
(the file system is read-only, the file is gone) is raised, because nothing would tell when it is over.
"""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

from asd_megatron.errors import UserError, plural
from asd_megatron.files import atomic_write, system_reason, to_json, write_all

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that has one JSON object a step, in order of steps; null is None.

    A last line without its newline was torn by a kill (or is being written) and is left out. Raises UserError for any
    other line that is not one JSON object with a `step`.
    """
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


class LineFile:
    """Appends JSON lines to a file. It starts empty; resuming from the state after step `resume_step` keeps the lines
    up to that step and drops later ones atomically, and a torn last one.

    last_step: of the newest line, -1 without one. Raises UserError for a damaged line that is kept, OSError for what
    the operating system refuses.
    """

    def __init__(self, path: Path, *, resume_step: int | None = None) -> None:
        self.path = path
        kept: list[dict[str, Any]] = []
        if resume_step is not None and path.is_file():
            kept = [row for row in read_lines(path) if row["step"] <= resume_step]
        atomic_write(path, "".join(to_json(row) + "\n" for row in kept))
        self.last_step = kept[-1]["step"] if kept else -1
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        self._waiting: list[bytes] = []

    @property
    def waiting(self) -> int:
        """The number of lines that wait in memory."""
        return len(self._waiting)

    def write(self, row: dict[str, Any]) -> str | None:
        """Append a line, after those that wait; or let it wait too, for lack of room. Returns a message for the console
        when lines begin to wait, and when they no longer do. Raises OSError for any other refusal, and where the file
        is not there any more."""
        before = self.waiting
        self._waiting.append(to_json(row).encode() + b"\n")
        try:
            self.write_waiting()
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            if before:
                return None
            return f"warning: {self.path} cannot be written ({system_reason(error)}): lines wait in memory for room"
        return f"{self.path}: {plural(before, 'line')} that had waited for room are written" if before else None

    def write_waiting(self) -> None:
        """Write the lines that wait, all or none. Raises OSError when they cannot be written."""
        if not os.path.samestat(os.fstat(self._file), os.stat(self.path)):
            raise FileNotFoundError(errno.ENOENT, "another file has taken its place", str(self.path))
        if not self._waiting:
            return
        size, data = os.fstat(self._file).st_size, b"".join(self._waiting)
        try:
            write_all(self._file, data)
        except OSError:
            os.ftruncate(self._file, size)
            raise
        self._waiting.clear()

    def close(self) -> None:
        """Close the file. Raises OSError for lines that still wait and cannot be written."""
        if self._file >= 0:
            try:
                if self._waiting:
                    self.write_waiting()
            finally:
                os.close(self._file)
                self._file = -1

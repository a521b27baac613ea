"""RUN/logs/rank_N.log: the messages of one rank that are not for the console.

Every rank appends to its own file: a line for each start, its warnings, the traceback of its error, the Python stacks
of all its threads when the run hangs, and those of a process that crashes (faulthandler). Until the run has begun in
its folder a file is opened only when there is something to write.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import IO

from asd_megatron.files import utc_now

LOGS = "logs"
PACKAGE = "asd_megatron"


class _LogHandler(logging.StreamHandler[IO[str]]):
    """Drops what cannot be written, where logging's own prints a traceback on the console for each line."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


class RankLog:
    """The log of this process's rank in the run folder `folder`."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder, self.rank = folder, rank
        self._file: IO[str] | None = None
        self._handler: logging.Handler | None = None
        self._crashes = False

    def path(self, rank: int) -> Path:
        """The file of a rank."""
        return self._folder / LOGS / f"rank_{rank}.log"

    def begin(self, text: str) -> None:
        """The run has begun in its folder: write the line of this start, and from now on warnings and crashes."""
        self.write(text)
        if self._file is None:
            return
        self._handler = _LogHandler(self._file)
        self._handler.setLevel(logging.WARNING)
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logging.getLogger().addHandler(self._handler)
        if not faulthandler.is_enabled():
            faulthandler.enable(self._file)
            self._crashes = True

    def write(self, text: str) -> None:
        """Append a paragraph, with the time. What cannot be written is dropped: the run does not end for its log."""
        with suppress(OSError, ValueError):
            file = self._open()
            print(f"{utc_now()} rank {self.rank}, process {os.getpid()}: {text}", file=file, flush=True)

    def error(self, error: BaseException) -> None:
        """The traceback of an error, once there is a run folder."""
        if self._folder.is_dir():
            self.write("".join(traceback.format_exception(error)).rstrip())

    def stacks(self, why: str) -> None:
        """The Python stacks of all threads."""
        self.write(f"{why}\nPython stacks of all threads, the newest call first:")
        if self._file is not None:
            with suppress(OSError, ValueError):
                faulthandler.dump_traceback(self._file, all_threads=True)

    def end_after(self, seconds: float, *, on_console: bool) -> None:
        """Write the stacks and end this process, with status 1, unless this is called again within `seconds`: done by a
        thread that needs no interpreter, which may be blocked. on_console: nobody else will say that it has ended."""
        file = sys.__stderr__ if on_console or self._file is None else self._file
        if file is not None:
            with suppress(OSError, ValueError):
                faulthandler.dump_traceback_later(seconds, file=file, exit=True)

    def close(self) -> None:
        """Safe to call twice."""
        faulthandler.cancel_dump_traceback_later()
        if self._handler is not None:
            logging.getLogger().removeHandler(self._handler)
        if self._crashes:
            faulthandler.disable()
            self._crashes = False
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            self._file = None

    def _open(self) -> IO[str]:
        if self._file is None:
            path = self.path(self.rank)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", encoding="utf-8", errors="backslashreplace")
        return self._file


_current: RankLog | None = None


def use(log: RankLog) -> None:
    """From now on `log` is this process's."""
    global _current
    _current = log


def begin(text: str) -> None:
    """`RankLog.begin` of this process's log."""
    if _current is not None:
        _current.begin(text)


def current() -> RankLog | None:
    """The log of the run in this process, None before it has one."""
    return _current


def set_levels(level: str, *, on_console: bool) -> None:
    """The level of this package's messages; without `on_console` errors alone reach the console, warnings the log."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger(PACKAGE).setLevel(level.upper() if on_console else logging.WARNING)
    if not on_console:
        for handler in logging.getLogger().handlers:
            handler.addFilter(_not_on_console)


def _not_on_console(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR or not record.name.startswith(PACKAGE)

"""Standard output and error that cannot end a run: a closed pipe, a lost terminal and a full disk are tolerated."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

GONE = (errno.EPIPE, errno.EIO, errno.EBADF)  # nobody will read this stream again; a full disk may be emptied


class TolerantStream:
    """A text stream whose `write` and `flush` never raise because the text cannot be written.

    A stream whose reader has gone (`asd-megatron train ... | head -1`, a terminal that was closed) is pointed at
    /dev/null, which also holds for libraries that write to its file descriptor and for processes started later. After
    other errors (a full disk) the text may be lost, and the next one is tried again. Everything else is `stream`'s.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def isatty(self) -> bool:
        try:
            return self._stream.isatty()
        except ValueError:  # closed
            return False

    def finish(self) -> None:
        """Flush for the last time. Text that still cannot be written is dropped: Python flushes the stream again when
        it exits, and would turn the failure into exit status 120."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                _to_devnull(self._stream.fileno())
                self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            if error.errno in GONE:
                with suppress(OSError, ValueError):
                    _to_devnull(self._stream.fileno())
        except ValueError:  # "I/O operation on closed file"
            pass


def _to_devnull(descriptor: int) -> None:
    devnull = os.open(os.devnull, os.O_RDWR)
    os.dup2(devnull, descriptor)
    os.close(devnull)


@contextmanager
def tolerant_output() -> Iterator[None]:
    """Make sys.stdout and sys.stderr tolerant inside. Characters that an encoding lacks are written as escapes."""
    _open_missing()
    saved = sys.stdout, sys.stderr
    for text in saved:
        if isinstance(text, io.TextIOWrapper):
            text.reconfigure(errors="backslashreplace")
    tolerant = [TolerantStream(stream) for stream in saved]
    sys.stdout, sys.stderr = (cast(TextIO, stream) for stream in tolerant)
    try:
        yield
    finally:
        for stream in tolerant:
            stream.finish()
        sys.stdout, sys.stderr = saved


def flush_output() -> None:
    """Flush standard output and standard error."""
    sys.stdout.flush()
    sys.stderr.flush()


def _open_missing() -> None:
    """Open /dev/null on standard descriptors that were closed (`>&-`): another file would get their numbers, and with
    it what libraries print."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is `descriptor`
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - lives as long as the process
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115

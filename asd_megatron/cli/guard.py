"""Exit status and error message of a program: one line for an error that the user can fix, and never
status 0 before the end.

`guarded` is for console commands, `as_rank` for the training programs.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

from asd_megatron.cli.console import flush_output, tolerant_output
from asd_megatron.distributed import rank_log
from asd_megatron.distributed.launcher import COMMAND, end_with_launcher, launcher_reports
from asd_megatron.distributed.stop_signals import SIGNALS
from asd_megatron.errors import UserError

FAILED = 1  # exit status
USER_ERROR = 2  # exit status
INTERRUPTED = 130  # exit status: 128 + SIGINT
PROGRAMS = ("asd_megatron.train", "asd_megatron.sft", "asd_megatron.evaluate")
LINE = 160  # characters of another rank's error
_reported: BaseException | None = None  # by `report_at_once`
_logged: BaseException | None = None


def guarded(program: Callable[[], int]) -> int:
    """Run `program` and return its exit status: 2 after a UserError, printed as `error: ...`; 130 after Ctrl-C.

    Output that cannot be written is dropped: `asd-megatron recipes | head` ends quietly, and training continues.
    """
    with tolerant_output():
        try:
            return program()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            return USER_ERROR
        except KeyboardInterrupt:
            return INTERRUPTED


def as_rank(program: Callable[[], int]) -> int:
    """Run a training program as one rank and return its exit status as `guarded` does; it ends when its launcher dies.

    SystemExit is an error here: it comes from code of the user's (a reward that calls `sys.exit(0)`). Among several
    ranks one reports, with its traceback unless the error is a UserError; the others repeat nothing and say in one line
    what else they met, usually a collective that broke. If that broke because a rank is lost, the message says which.
    With LOGLEVEL set every rank prints its traceback; each writes its own to its log in the run folder.
    """
    with tolerant_output():
        end_with_launcher(os.environ)
        try:
            return program()
        except KeyboardInterrupt:
            return INTERRUPTED
        except (Exception, SystemExit) as error:
            _log(error)
            if not _alone():
                _report_among_ranks(error)
            elif isinstance(error, UserError | SystemExit):
                _report(error)
            else:
                raise
            return USER_ERROR if isinstance(error, UserError) else FAILED


@contextmanager
def report_at_once(*others: type[Exception]) -> Iterator[None]:
    """Inside `as_rank`: report an error of the block among several ranks before what is open around it is closed, which
    may take long (servers). Exceptions of the classes `others` are no errors."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if not isinstance(error, others):
            _log(error)
        if not _alone() and not isinstance(error, others):
            _report_among_ranks(error)
        raise


def leave(status: int) -> NoReturn:
    """End this process with `status`. A rank that failed among others ends at once: Python's own way out would wait for
    them in the destructors of process groups. A request to stop that arrives in the seconds of that way out does not
    change the status: the run has ended and its state is saved."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if status and not _alone():
        os._exit(status)
    sys.exit(status)


@contextmanager
def importing(interrupted: str) -> Iterator[None]:
    """Around imports of large packages: a signal that asks for the end ends the process at once, with the line
    `interrupted` (none if empty). A KeyboardInterrupt would come out of a half-imported package as another exception,
    with a traceback."""
    before = _end_at_signals(interrupted)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_at_signals(text: str) -> dict[int, Any]:
    """Let the signals that ask for the end, unless they are ignored, end this process with `text` and status 128 + n;
    returns their handlers so far."""

    def end(number: int, frame: FrameType | None) -> None:
        with suppress(OSError):
            os.write(2, f"{text}\n".encode() if text else b"")
        os._exit(128 + number)

    kept = (signal.SIG_DFL, signal.default_int_handler)
    return {number: signal.signal(number, end) for number in SIGNALS if signal.getsignal(number) in kept}


def _end_program_at_signals() -> None:
    """In a training program, until it opens its run: a signal ends it at once. Among several ranks one says so, of
    `asd-megatron` the launcher."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if spec is not None and spec.name in PROGRAMS:
        again = os.environ.get(COMMAND, "the same command")
        silent = launcher_reports(os.environ) or os.environ.get("RANK", "0") != "0"
        _end_at_signals("" if silent else f"interrupted before the run began: nothing is lost; to start it: {again}")


def _log(error: BaseException) -> None:
    """Write the traceback to this rank's log."""
    global _logged
    log = rank_log.current()
    if log is not None and error is not _logged and not isinstance(error, UserError):
        _logged = error
        log.error(error)


def _alone() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) == 1


def _report(error: BaseException) -> None:
    """Print `error` as the cause of the end."""
    rank = os.environ.get("RANK", "0")
    if isinstance(error, UserError):
        print(f"error{'' if rank == '0' else f' (rank {rank})'}: {error}", file=sys.stderr, flush=True)
        return
    if not _alone():
        print(f"rank {rank} failed:", file=sys.stderr)
    traceback.print_exception(error)
    if isinstance(error, SystemExit):
        print(
            f"error: sys.exit({error.code!r}) was called before the end of the run (traceback above): let that code"
            " return, or raise an exception",
            file=sys.stderr,
        )
    flush_output()


def _report_among_ranks(error: BaseException) -> None:
    global _reported
    from asd_megatron.distributed.first_error import report_once  # imports torch
    from asd_megatron.distributed.lost_ranks import lost_ranks

    if error is _reported:
        return
    _reported = error
    if not os.environ.get("LOGLEVEL"):
        error = lost_ranks(error) or error
    message = _one_line(error)
    first = report_once(message, lambda: _report(error))
    if first is None:
        return
    if os.environ.get("LOGLEVEL"):
        traceback.print_exception(error)
    elif first not in message and message not in first:
        print(f"rank {os.environ['RANK']} ended too: {message}", file=sys.stderr)
    flush_output()


def _one_line(error: BaseException) -> str:
    line = (str(error).strip().splitlines() or [""])[0]
    return line if isinstance(error, UserError) else f"{type(error).__name__}: {line[:LINE]}"


_end_program_at_signals()

"""What reading a damaged file may do: work, or raise a UserError. Nothing else, in bounded time and memory."""

from __future__ import annotations

import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from asd_megatron.errors import UserError

SECONDS = 30.0
BYTES = 2 << 30


class Hangs(BaseException):
    """Reading did not end."""


@contextmanager
def bounded() -> Iterator[None]:
    """Raise Hangs after SECONDS in the body, and MemoryError where it maps BYTES more than the process has."""

    def late(number: int, frame: Any) -> NoReturn:
        raise Hangs

    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, late)
    before = signal.setitimer(signal.ITIMER_REAL, SECONDS)  # pytest-timeout's
    resource.setrlimit(resource.RLIMIT_AS, (mapped + BYTES, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.setitimer(signal.ITIMER_REAL, *before)
        signal.signal(signal.SIGALRM, handler)


def refusal(read: Callable[[], Any]) -> str | None:
    """The message with which `read` refuses a file; None when it can read it. Any other error is a failure."""
    with bounded():
        try:
            read()
        except UserError as error:
            return str(error)
    return None

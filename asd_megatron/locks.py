"""Locks that a live process holds on a file. The kernel releases them when the holder ends, however it ends."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from asd_megatron.errors import UserError
from asd_megatron.files import utc_now

HELD = (errno.EAGAIN, errno.EACCES)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)
log = logging.getLogger(__name__)


@contextmanager
def locked(path: Path, refusal: Callable[[str], str]) -> Iterator[int]:
    """Hold the lock on the file `path`, in a folder that exists. Yields the file descriptor; a child that inherits it
    holds the lock too.

    Raises UserError with `refusal(holder)` when another process holds it, on this machine or, where the file system
    passes locks on (NFS does), on another one; `holder` reads `process 4711 on node7 since 2026-01-31T12:00:00+00:00`.
    Raises OSError when the file cannot be opened. A file system without locks is warned about: the file then protects
    nothing. The file stays: a holder that wants it gone removes it before it leaves.
    """
    handle = _acquire(path, refusal)
    try:
        yield handle
    finally:
        os.close(handle)


def holder(path: Path) -> str | None:
    """Who holds the lock on the file `path`, as in `locked`; None when nobody does. Writes nothing. Raises OSError when
    the file is there and cannot be opened."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return _name(handle) if error.errno in HELD else None
    finally:
        os.close(handle)
    return None


def _name(handle: int) -> str:
    """The holder that the lock's file names."""
    return os.pread(handle, 200, 0).decode("utf-8", "replace").strip() or "an unknown process"


def _acquire(path: Path, refusal: Callable[[str], str]) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            _lock(handle, path, refusal)
            if _is(handle, path):
                os.ftruncate(handle, 0)
                os.pwrite(handle, f"{_this_process()}\n".encode(), 0)
                return handle
        except OSError as error:
            if error.errno == errno.ENOSPC:  # a full disk: held, without a name in it
                return handle
            os.close(handle)
            raise
        except UserError:
            os.close(handle)
            raise
        os.close(handle)  # an earlier holder removed the file between our opening and locking it: take the new one


def _lock(handle: int, path: Path, refusal: Callable[[str], str]) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD:
            raise UserError(refusal(_name(handle))) from None
        if error.errno not in NO_LOCKS:
            raise
        log.warning("%s: this file system has no locks (%s), a second run would not be noticed", path, error.strerror)


def _is(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()} since {utc_now()}"

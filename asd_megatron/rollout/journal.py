"""Append-only files of JSON records that survive a kill at any moment.

A line is the BLAKE2b-128 digest of the record in hexadecimal, a space, the record as JSON:

    9f86d081884c7d659a2feaa0c55ad015 {"id": "p7", "sample": 3, "ids": {"<i4": "BQAAAA=="}}

A kill can tear the last line alone; damage of the disk costs the lines that it is in: both are found by the digest, and
the other lines are read. Arrays are the base64 of their bytes under numpy's name of their type. Nothing is unpickled.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import queue
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from asd_megatron.files import atomic_write, ends_torn, system_reason, write_all

MAX_WAITING = 16384  # records that may wait for a slow disk; further ones are not written
CLOSE_SECONDS = 30.0
DIGEST_BYTES = 16
TYPES = ("<i2", "<i4", "<f4")
"""Of arrays; others are not read."""

Record = dict[str, Any]


def encoded(record: Mapping[str, Any]) -> bytes:
    """The line of a record of JSON values and arrays [n] or [n, ...] of one of `TYPES`."""

    def array(value: object) -> dict[str, Any]:
        if not isinstance(value, np.ndarray):
            raise TypeError(f"a journal keeps JSON values and arrays, not a {type(value).__name__}")
        kind = value.dtype.newbyteorder("<").str
        data = base64.b64encode(value.astype(kind, copy=False).tobytes()).decode()
        return {kind: data} if value.ndim == 1 else {kind: data, "shape": list(value.shape)}

    text = json.dumps(record, default=array, ensure_ascii=True, separators=(",", ":")).encode()
    return _digest(text) + b" " + text + b"\n"


def read(path: Path) -> tuple[list[Record], int]:
    """The records of a file in their order, arrays as they were, and how many lines are torn or damaged. Raises
    OSError."""
    records, damaged = [], 0
    with path.open("rb") as file:
        for line in file:
            digest, _, text = line.rstrip(b"\n").partition(b" ")
            if not digest:
                continue
            try:
                if not line.endswith(b"\n") or digest != _digest(text):
                    raise ValueError("torn or damaged")
                records.append({name: _decoded(value) for name, value in json.loads(text).items()})
            except (AttributeError, RecursionError, TypeError, ValueError):
                damaged += 1
    return records, damaged


def write(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Replace a file by these records, atomically. Raises OSError."""
    atomic_write(path, b"".join(map(encoded, records)))


def _digest(text: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=DIGEST_BYTES).hexdigest().encode()


def _decoded(value: Any) -> Any:
    kind = next((kind for kind in TYPES if isinstance(value, dict) and kind in value), None)
    if kind is None:
        return value
    array = np.frombuffer(base64.b64decode(value[kind], validate=True), dtype=kind)
    return array.reshape(value["shape"]) if "shape" in value else array


class Journal:
    """Appends to the files of one folder, in a daemon thread; the caller waits for nothing but `close`.

    A record survives a kill of the process as soon as the thread has passed it to the operating system,
    and a crash of the machine once no more of them wait (fsync). What cannot be written is lost: `failed` is told the
    reason, once until a write succeeds again; nothing is raised.
    """

    def __init__(self, folder: Path, failed: Callable[[str], None]) -> None:
        self._folder, self._failed = folder, failed
        self._work: queue.SimpleQueue[tuple[str, Mapping[str, Any] | None] | None] = queue.SimpleQueue()
        self._files: dict[str, BinaryIO] = {}
        self._unsynced: set[str] = set()
        self._failing = False
        self._thread: threading.Thread | None = None

    def append(self, name: str, record: Mapping[str, Any]) -> None:
        """Append a record to the file `name`. Its arrays must not change afterwards."""
        if self._work.qsize() < MAX_WAITING:
            self._put((name, record))
        else:
            self._fail(f"the disk is slower than the rollouts: {MAX_WAITING} responses wait for it")

    def remove(self, name: str) -> None:
        """Remove the file `name`, after what was appended before."""
        self._put((name, None))

    def close(self) -> None:
        """Write what waits, within CLOSE_SECONDS. Safe to call twice."""
        if self._thread is not None:
            self._work.put(None)
            self._thread.join(CLOSE_SECONDS)
            self._thread = None

    def _put(self, work: tuple[str, Mapping[str, Any] | None]) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="rollout-bank", daemon=True)
            self._thread.start()
        self._work.put(work)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            name, record = work
            try:
                if record is None:
                    self._close(name)
                    (self._folder / name).unlink(missing_ok=True)
                else:
                    self._append(name, encoded(record))
                if self._work.empty():
                    self._sync()
                self._failing = False
            except OSError as error:
                with suppress(OSError):
                    self._close(name)
                self._fail(system_reason(error))
        with suppress(OSError):
            self._sync()
        for name in list(self._files):
            with suppress(OSError):
                self._close(name)

    def _append(self, name: str, line: bytes) -> None:
        if name not in self._files:
            self._folder.mkdir(exist_ok=True)
            self._files[name] = (self._folder / name).open("ab+", buffering=0)
            if ends_torn(self._files[name]):
                line = b"\n" + line
        self._unsynced.add(name)
        write_all(self._files[name].fileno(), line)

    def _sync(self) -> None:
        while self._unsynced:
            os.fsync(self._files[self._unsynced.pop()].fileno())

    def _close(self, name: str) -> None:
        self._unsynced.discard(name)
        file = self._files.pop(name, None)
        if file is not None:
            file.close()

    def _fail(self, reason: str) -> None:
        if not self._failing:
            self._failing = True
            self._failed(reason)

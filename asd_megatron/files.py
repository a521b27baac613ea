"""Files and folders that are either complete or absent, and the strict reading of JSON.

Everything is written into a temporary sibling (same file system) and renamed, so that neither a reader nor a process
that was killed half way leaves a torn file. For a target `hf/step_000060` the siblings are called

    hf/.step_000060.0f3a9c2b7d11.partial             being written
    hf/.step_000060.0f3a9c2b7d11.replaced.partial    the older version while the new one takes its place

`remove_partial` clears what a killed process left of them.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, NoReturn

from asd_megatron.errors import UserError

PARTIAL = ".partial"
LOST = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
"""Errors of a flush to the disk that mean lost data; others, such as EINVAL, mean that it is not offered there."""
REPLACED = ".replaced" + PARTIAL
MAX_JSON_BYTES = 64 << 20  # the tensor index of the largest published models has about 10 MiB
_REPLACED_NAME = re.compile(rf"\.(?P<target>.+)\.[0-9a-f]{{12}}{re.escape(REPLACED)}")


def _sibling(path: Path, suffix: str = PARTIAL) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}{suffix}")


def _sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk. Raises OSError when data that was accepted before cannot
    be written (no space, a quota, a failing disk). Where a file system does not offer it, the rename has to do."""
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno in LOST:
            raise


def _discard(path: Path) -> None:
    """Remove a temporary file or folder if that is possible: the error that led here must not be hidden by another."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def user_error(what: str, remedy: str) -> Iterator[None]:
    """Raise an OSError from inside as a UserError, `WHAT (the system's reason: the file): REMEDY`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what} ({system_reason(error)}): {remedy}") from error


def read_private(path: Path, what: str, remedy: str) -> str:
    """The text of a file with keys. Raises UserError if it cannot be read (`remedy`: what to do), or if others than its
    owner may read it."""
    with user_error(f"the file of {what} {path} cannot be read", remedy):
        text, mode = path.read_bytes().decode(errors="replace"), path.stat().st_mode
    if mode & 0o077:
        raise UserError(f"the file of {what} {path} can be read by others: chmod 600 {path}")
    return text


def utc_now() -> str:
    """The time as all records have it, `2026-01-31T08:00:00+00:00`; later times sort later."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def system_reason(error: OSError) -> str:
    """The operating system's reason and the file, if it names one: `Permission denied: 'hf/config.json'`."""
    text = error.strerror or str(error)
    return text if error.filename is None else f"{text}: {os.fspath(error.filename)!r}"


def remedy(error: OSError) -> str:
    """What lets a write succeed that the operating system has refused with `error`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "free space there (or raise a limit: quota, ulimit -f)"
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return "put back what was moved or removed"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return "make it writable"
    return "check the disk and the folder"


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path to write one file to; on leaving without an error it replaces `path`, else it is removed.

    Parent folders are created. For writers that want a path of their own (Parquet, safetensors, images).
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = _sibling(target)
    try:
        yield partial
        _sync(partial)
        os.replace(partial, target)
        _sync(target.parent)
    finally:
        _discard(partial)


def atomic_write(path: str | os.PathLike[str], data: str | bytes) -> Path:
    """Write text (UTF-8, line ends as given) or bytes as the complete content of `path`. Returns the path."""
    with atomic_file(path) as partial:
        partial.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)
    return Path(path)


@contextmanager
def atomic_folder(path: str | os.PathLike[str], *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling folder to fill; on leaving without an error it becomes `path`, else it is removed.

    An existing `path` raises UserError before anything is written, unless `replace`: then it is set aside and removed,
    and only between two renames is there a moment without it (`remove_partial` restores it after a kill there).
    """
    target = Path(path)
    if target.exists() and not replace:
        raise UserError(f"{target} exists already: remove it or choose another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = _sibling(target)
    partial.mkdir()
    old: Path | None = None
    try:
        yield partial
        for root, _, names in os.walk(partial):
            for name in names:
                _sync(Path(root) / name)
            _sync(Path(root))
        if target.exists() and replace:
            old = _sibling(target, REPLACED)
            os.rename(target, old)
        try:
            os.rename(partial, target)
        except OSError:
            if old is not None:
                os.rename(old, target)
            raise
        _sync(target.parent)
    finally:
        _discard(partial)
        if old is not None and target.exists():
            _discard(old)


def remove_folder(path: str | os.PathLike[str]) -> None:
    """Remove a folder so that no reader sees a part of it: it is renamed to a temporary name first."""
    aside = _sibling(Path(path))
    os.rename(path, aside)
    shutil.rmtree(aside)


def remove_partial(folder: str | os.PathLike[str]) -> int:
    """Remove what killed writers left directly in `folder`; returns how many. No other process may be writing there.

    A folder that was set aside for a new version which never took its place gets its name back.
    """
    left = sorted(Path(folder).glob(f".*{PARTIAL}")) if Path(folder).is_dir() else []
    for path in left:
        replaced = _REPLACED_NAME.fullmatch(path.name)
        target = None if replaced is None else path.with_name(replaced["target"])
        if target is not None and not target.exists():
            os.rename(path, target)
        else:
            _discard(path)
    return len(left)


def json_safe(value: Any) -> Any:
    """`value` with non-finite floats as None (JSON has no NaN), paths as text, tuples and sets as lists,
    zero-dimensional tensors and numpy scalars as plain numbers.
    """
    if isinstance(value, Mapping):
        return {str(k): json_safe(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [json_safe(v) for v in value]
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if not isinstance(value, float) and hasattr(value, "item"):
        return json_safe(value.item())
    return value if not isinstance(value, float) or math.isfinite(value) else None


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Strict JSON text of `value` (see `json_safe`), keys in the order given."""
    return json.dumps(json_safe(value), indent=indent, ensure_ascii=False, allow_nan=False)


def write_json(path: str | os.PathLike[str], value: Any) -> Path:
    """Atomically write `value` as indented JSON with a final newline."""
    return atomic_write(path, to_json(value, indent=2) + "\n")


def ends_torn(file: IO[bytes]) -> bool:
    """Whether the last line of a file, opened for appending and reading, has no newline: a kill has torn it."""
    end = file.tell()
    return end > 0 and os.pread(file.fileno(), 1, end - 1) != b"\n"


def write_all(file: int, data: bytes) -> None:
    """Write to a file descriptor, as `os.write`, which may write a part. Raises OSError, after a part perhaps."""
    written = 0
    while written < len(data):
        written += os.write(file, data[written:])


def open_regular(path: str | os.PathLike[str]) -> IO[bytes]:
    """Open a file for reading that somebody else may have made. OSError unless it is a regular file: opening a pipe
    would wait for its writer, and a device has no end."""
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise OSError(errno.EINVAL, "it is no regular file", os.fspath(path))
    return os.fdopen(number, "rb")


def foreign_file(file: Path, folder: Path) -> str | None:
    """Why a file that a model folder names is not read; None for a regular file of the folder, or of the cache
    repository that the folder is a snapshot of:

        hub/models--Qwen--Qwen3-8B/snapshots/b968826/tokenizer.json -> ../../blobs/aeb13307a71a

    Raises OSError for one that does not exist.
    """
    target = Path(os.path.realpath(file, strict=True))
    if not is_inside(target, folder):
        return f"{file} is a link to {target}, outside of the model folder: {_instead_of_link(target)}"
    return None if target.is_file() else f"{file} cannot be read: it is no regular file; download it again"


def _instead_of_link(target: Path) -> str:
    """What to do about a link to `target` in a model folder."""
    repository = target.parent.parent
    if target.parent.name == "blobs" and repository.name.startswith("models--"):
        return f"it is one of the cache of Hugging Face, so give a folder in {repository / 'snapshots'} as model.path"
    return (
        "put a copy of it there (cp --dereference), or move the folder's other files to where it is and give that"
        f" folder, {target.parent}, as model.path, which may itself be a link"
    )


def check_own_file(file: Path, folder: Path) -> None:
    """Raise UserError for a file of a model folder that is there and not to be read (`foreign_file`)."""
    with user_error(f"{file} cannot be read", "check its permissions, or download it again"):
        reason = foreign_file(file, folder) if os.path.lexists(file) else None
    if reason is not None:
        raise UserError(reason)


def is_inside(target: Path, folder: Path) -> bool:
    """Whether a resolved file is one of a model folder, or of the cache repository that it is a snapshot of."""
    home = folder.resolve()
    caches = [parent.parent / "blobs" for parent in home.parents if parent.name == "snapshots"]
    return any(target.is_relative_to(place) for place in (home, *caches))


def read_json_object(path: str | os.PathLike[str], remedy: str, *, non_finite: bool = False) -> dict[str, Any]:
    """The JSON object in the file `path`, whoever wrote it.

    Raises UserError with the file, the reason and the `remedy` when it cannot be read, has more than MAX_JSON_BYTES, is
    not UTF-8 or not JSON, is nested too deeply, gives a key twice, or holds another value than an object, half of a
    surrogate pair or (unless `non_finite`) a number that no float can hold, NaN or Infinity.
    """
    try:
        with open_regular(path) as file:
            data = file.read(MAX_JSON_BYTES + 1)
        if len(data) > MAX_JSON_BYTES:
            raise ValueError(f"it has more than {MAX_JSON_BYTES >> 20} MiB")
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_without_duplicates,
            parse_constant=None if non_finite else _refuse_number,
            parse_float=None if non_finite else _finite,
        )
        if not isinstance(value, dict):
            raise ValueError("it does not hold a JSON object")
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        reason = "it holds half of a surrogate pair (\\ud800 to \\udfff), which is no character"
    except RecursionError:
        reason = "it is nested too deeply"
    except (OSError, ValueError) as error:
        reason = str(error)
    else:
        return value
    raise UserError(f"{os.fspath(path)} cannot be read: {reason}; {remedy}")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for name, inner in pairs:
        if name in value:
            raise ValueError(f"the key {name[:80]!r} is given twice")
        value[name] = inner
    return value


def _refuse_number(text: str) -> NoReturn:
    raise ValueError(f"{text[:40]} is not a number that JSON and a 64-bit float can hold")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse_number(text)

"""Files that are either whole or absent: atomic text, JSON, bytes and folders.

Everything is written into a temporary sibling (same file system) and renamed, so that neither a reader nor a run that
was killed half way ever sees a torn file. Temporary names start with a dot and end in `.partial`; `remove_partial`
clears what a killed process left.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from asd_megatron.errors import UserError

PARTIAL = ".partial"


def _sibling(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}{PARTIAL}")


def _sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk. Where a file system refuses it, the rename has to do."""
    with suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


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
        _remove(partial)


def atomic_write(path: str | os.PathLike[str], data: str | bytes) -> Path:
    """Write text (UTF-8, line ends as given) or bytes as the whole content of `path`. Returns the path."""
    with atomic_file(path) as partial:
        partial.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)
    return Path(path)


@contextmanager
def atomic_folder(path: str | os.PathLike[str], *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling folder to fill; on leaving without an error it becomes `path`, else it is removed.

    An existing `path` raises UserError before anything is written, unless `replace`: then it is swapped out whole,
    and only between two renames is there a moment without it.
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
            old = _sibling(target)
            os.rename(target, old)
        try:
            os.rename(partial, target)
        except OSError:
            if old is not None:
                os.rename(old, target)
            raise
        _sync(target.parent)
    finally:
        _remove(partial)
        if old is not None and target.exists():
            _remove(old)


def remove_partial(folder: str | os.PathLike[str]) -> int:
    """Remove what killed writers left directly in `folder`; returns how many. No other process may be writing there."""
    left = [p for p in Path(folder).glob(f".*{PARTIAL}")] if Path(folder).is_dir() else []
    for path in left:
        _remove(path)
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

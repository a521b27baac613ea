"""Data files as rows: JSONL, JSON documents, Parquet, compressed text, folders of these, folders of `datasets`.

Nothing is downloaded, and nothing that comes with a data set is run: no loading scripts, no pickle.
"""

from __future__ import annotations

import bz2
import glob
import gzip
import io
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

from asd_megatron.data.jsonl import DataError, IncompleteJson, LineError, kind_of, parse_json
from asd_megatron.errors import hub_hint

MAX_LINE_BYTES = 64 << 20
MAX_DOCUMENT_BYTES = 1 << 30  # of a JSON document, which is read at once and takes about ten times as much memory
PEEKED = 4096  # bytes at the start of a file that tell what it is
KINDS = "JSONL, JSON, Parquet, one of these compressed text files (.gz, .bz2, .xz, .zst), or a folder of them"
PARQUET = b"PAR1"
COMPRESSED: dict[bytes, tuple[str, Callable[[IO[bytes]], Any]]] = {
    b"\x1f\x8b": ("gzip", lambda file: gzip.GzipFile(fileobj=file)),
    b"BZh": ("bzip2", bz2.BZ2File),
    b"\xfd7zXZ\x00": ("xz", lzma.LZMAFile),
    b"\x28\xb5\x2f\xfd": ("Zstandard", lambda file: _zstandard(file)),
}
"""Formats that are unpacked while they are read, by their first bytes."""
REFUSED = (
    (b"ARROW1", "an Arrow file", "give the folder that Dataset.save_to_disk wrote, or save it as Parquet"),
    (b"PK\x03\x04", "a zip file", "unpack it: unzip FILE"),
    (b"\xff\xfe", "UTF-16 text", "convert it to UTF-8: iconv -f UTF-16 -t UTF-8 FILE > FILE.jsonl"),
    (b"\xfe\xff", "UTF-16 text", "convert it to UTF-8: iconv -f UTF-16 -t UTF-8 FILE > FILE.jsonl"),
    (b"version https://git-lfs", "a Git LFS pointer", "get the file itself: git lfs pull"),
)
SUFFIX = re.compile(r"\.(?:jsonl|ndjson|json|parquet)(?:\.(?:gz|bz2|xz|zst))?$", re.IGNORECASE)
NO_DATA = {"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"}
"""JSON files of data sets that hold no rows."""
SPLIT = re.compile(
    r"(?P<name>[A-Za-z][A-Za-z0-9]*(?:_[A-Za-z0-9]+)*?)[-_.]\d{2,}(?:[-_]of[-_]\d+)?(?:-[0-9a-f]{8,})?\."
)
SHARD = re.compile(r"[-_.]\d{2,}[-_]of[-_](\d{2,})(?:-[0-9a-f]{8,})?\.")
KNOWN_SPLITS = re.compile(r"(?:^|[-_.])(train|test|validation|valid|val|dev|eval)(?:[-_.]|$)", re.IGNORECASE)
DAMAGED = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError)
"""What reading compressed text raises where it is damaged."""


class Row(NamedTuple):
    """One row of a file. Exactly one of `value`, `error` and `copy_of` is set.

    number: the line or the row of the file, from 1. error: why it cannot be read. copy_of: the number of an earlier row
    of this file that is equal in every column (Parquet files with many copies alone, for speed).
    """

    path: Path
    number: int
    unit: str  # "line" or "row"
    value: dict[str, Any] | None = None
    error: str | None = None
    copy_of: int | None = None

    @property
    def place(self) -> str:
        """`FILE:LINE` or `FILE: row N`."""
        return f"{self.path}:{self.number}" if self.unit == "line" else f"{self.path}: row {self.number}"


def read_rows(path: str | Path) -> Iterator[Row]:
    """The rows of a file, of a folder of files, or of all files that a pattern (`data/train-*.parquet`) fits, in order.

    Rows that cannot be read are given with their `error`, and reading goes on. Raises DataError for what is no data
    file, is missing or damaged, and for a folder with several splits. An empty file yields nothing.
    """
    for file in files_of(path):
        yield from _saved_rows(file) if file.is_dir() else _file_rows(file)


def files_of(path: str | Path) -> list[Path]:
    """The files (or the folder of `datasets`) that `path` names. Raises DataError."""
    path = Path(path)
    try:
        if path.is_dir():
            return [path] if _is_saved(path) else _in_folder(path)
        if glob.has_magic(str(path)) and not path.exists():
            found = sorted(Path(name) for name in glob.glob(str(path)) if _is_file(Path(name)))
            if not found:
                raise DataError(f"{path}: no file fits this pattern")
            return found
    except DataError:
        raise
    except (OSError, ValueError) as e:  # ValueError: a null character in the name
        raise DataError(f"cannot read {path}: {e}. Give the path of a data file ({KINDS})") from e
    return [path]


def _is_file(path: Path) -> bool:
    """Whether it is a file. Raises DataError for a link to nothing, as in a download that was interrupted."""
    if path.is_symlink() and not path.exists():
        raise DataError(f"{path} is a link to a file that does not exist: get the file again, or remove the link")
    return path.is_file()


# ---------------------------------------------------------------- folders


def _is_saved(folder: Path) -> bool:
    """Whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote the folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _in_folder(folder: Path) -> list[Path]:
    """The data files of a folder, or of its subfolder `data`, of one split."""
    for place in (folder, folder / "data"):
        found = sorted(p for p in place.iterdir() if _holds_data(p) and _is_file(p)) if place.is_dir() else []
        splits = {_split_of(file): file for file in found}
        if len(splits) > 1:
            names = sorted(name or "others" for name in splits)
            example = sorted(found)[-1]
            split = _split_of(example)
            pattern = f"{split}*{SUFFIX.search(example.name)[0]}" if split else example.name  # type: ignore[index]
            raise DataError(
                f"{folder} holds several splits ({', '.join(names)}): name the files of one, for instance"
                f" {place / pattern}"
            )
        if found:
            _refuse_missing(found)
            return found
    inner = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    hint = f": give one of its folders ({', '.join(inner[:8])})" if inner else ""
    raise DataError(f"{folder} is a folder without data files ({KINDS}){hint}")


def _refuse_missing(files: list[Path]) -> None:
    """Raise DataError where a file named as one of several (train-00000-of-00003) is without the others."""
    for count, found in Counter(m[1] for file in files if (m := SHARD.search(file.name))).items():
        if found < int(count):
            raise DataError(
                f"{files[0].parent} has {found} of the {int(count)} files named -of-{count}: get the others, or give"
                f" the pattern of those to read, {files[0].parent / '*'}{SUFFIX.search(files[0].name)[0]}"  # type: ignore[index]
            )


def _holds_data(path: Path) -> bool:
    return bool(SUFFIX.search(path.name)) and path.name not in NO_DATA and not path.name.startswith(".")


def _split_of(path: Path) -> str:
    """The split that a file name tells: `train` for train-00000-of-00003.parquet and gsm8k_train.jsonl; else ""."""
    sharded = SPLIT.match(path.name)
    if sharded is not None:
        return sharded["name"]
    known = KNOWN_SPLITS.search(SUFFIX.sub("", path.name))
    return known[1].lower() if known else ""


def _saved_rows(folder: Path) -> Iterator[Row]:
    from asd_megatron.data.columns import saved_batches

    return _column_rows(folder, saved_batches(folder))


def _column_rows(path: Path, batches: Iterator[Any]) -> Iterator[Row]:
    """The rows of pyarrow's record batches."""
    from asd_megatron.data.columns import rows_of_batches

    for row in rows_of_batches(batches, path):
        yield Row(path, row.number, "row", row.value, None, row.copy_of)


# ---------------------------------------------------------------- files


def _file_rows(path: Path) -> Iterator[Row]:
    with ExitStack() as stack:
        try:
            file: Any = stack.enter_context(path.open("rb"))
            start = file.peek(PEEKED)[:PEEKED]
        except (OSError, ValueError) as e:  # ValueError: a null character in the name
            why = (e.strerror if isinstance(e, OSError) else None) or e
            raise DataError(
                f"cannot read {path}: {why}. Give the path of a data file ({KINDS})"
                + hub_hint(path, " --repo-type dataset")
            ) from e
        if start.startswith(PARQUET):
            from asd_megatron.data.columns import parquet_batches

            yield from _column_rows(path, parquet_batches(path))
            return
        kind = next((c for signature, c in COMPRESSED.items() if start.startswith(signature)), None)
        if kind is not None:
            name, unpack = kind
            try:
                file = stack.enter_context(io.BufferedReader(unpack(file)))
                start = file.peek(PEEKED)[:PEEKED]
            except DAMAGED as e:
                raise DataError(f"{path}: a damaged {name} file: {e}; get it again") from e
        _check_text(path, start, packed=kind is not None)
        if path.suffix.lower() in (".csv", ".tsv") and start.lstrip()[:1] not in (b"{", b"["):
            raise DataError(
                f"{path} is a table of text (CSV), whose numbers have no types: save it as Parquet or JSONL"
            )
        yield from _text_rows(path, _lines(path, file, None if kind is None else kind[0]))


def _zstandard(file: IO[bytes]) -> Any:
    import pyarrow as pa

    return pa.CompressedInputStream(file, "zstd")


def _check_text(path: Path, start: bytes, *, packed: bool) -> None:
    """Refuse by name what is not text: `start` is the beginning of the file."""
    found = next(((kind, what) for signature, kind, what in REFUSED if start.startswith(signature)), None)
    if packed and (start.startswith(PARQUET) or any(map(start.startswith, COMPRESSED))):
        found = ("a packed file in a packed file", "unpack it once")
    elif found is None and b"\x00" in start:
        found = ("a binary file", f"give {KINDS}")
    if found is not None:
        kind, what = found
        raise DataError(f"{path} is {kind}: {what.replace('FILE', str(path))}")


def _lines(path: Path, file: Any, packed: str | None) -> Iterator[bytes]:
    """The lines of a file, in parts of MAX_LINE_BYTES + 1 at most. Split at b"\\n" alone: JSON text may hold other line
    separators."""
    try:
        yield from iter(partial(file.readline, MAX_LINE_BYTES + 1), b"")
    except DAMAGED as e:
        what = f"a damaged {packed} file" if packed else "cannot be read to its end"
        raise DataError(f"{path}: {what}: {e}; get it again") from e


def _text_rows(path: Path, lines: Iterator[bytes]) -> Iterator[Row]:
    first = True
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if len(line) > MAX_LINE_BYTES and not (first and _opens_array(line)):
            raise DataError(
                f"{path}:{number}: longer than {MAX_LINE_BYTES >> 20} MiB: shorten the problem, or split the line"
            )
        value, error = None, None
        try:
            value = None if first and _opens_array(line) else parse_json(line)
        except LineError as e:
            error = e
        if first and (_opens_array(line) or _is_wrapper(value) or isinstance(error, IncompleteJson)):
            yield from _document_rows(path, line, lines, number)
            return
        first = False
        if error is None and not isinstance(value, dict):
            error = LineError(f"expected a JSON object, found {kind_of(value)}")
        yield Row(path, number, "line", *((value, None) if error is None else (None, str(error))))


def _opens_array(line: bytes) -> bool:
    return line.lstrip(b"\xef\xbb\xbf \t")[:1] == b"["


def _is_wrapper(value: Any) -> bool:
    """Whether a JSON document is `{"data": [rows]}`, as some published files are."""
    rows = value.get("data") if isinstance(value, dict) else None
    return isinstance(rows, list) and bool(rows) and all(isinstance(row, dict) for row in rows) and len(value) <= 3


def _document_rows(path: Path, line: bytes, lines: Iterator[bytes], number: int) -> Iterator[Row]:
    """The rows of one JSON document over several lines: an array of objects, `{"data": [...]}`, or one object.
    `line` is its first line, number `number` of the file, `lines` the others."""
    parts, size = [b"\n" * (number - 1), line], len(line)
    for part in lines:
        parts.append(part)
        size += len(part)
        if size > MAX_DOCUMENT_BYTES:
            raise DataError(
                f"{path} is a JSON document of more than {MAX_DOCUMENT_BYTES >> 30} GiB, which would be read at once:"
                " convert it to JSONL (one object a line)"
            )
    try:
        value = parse_json(b"".join(parts))
    except LineError as e:
        raise DataError(f"{path}: {e} (read as one JSON document, because of its first line)") from e
    rows = value if isinstance(value, list) else value["data"] if _is_wrapper(value) else [value]
    for index, row in enumerate(rows, start=1):
        good = isinstance(row, dict)
        error = None if good else f"expected a JSON object, found {kind_of(row)}"
        yield Row(path, index, "row", row if good else None, error)

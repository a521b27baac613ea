"""Parquet files, and folders that the package datasets has written, as rows of JSON values."""

from __future__ import annotations

import datetime
import decimal
import hashlib
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from asd_megatron.data.jsonl import DataError
from asd_megatron.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS = 8192
COPIES_LOOKED_FOR = 8 * BATCH_ROWS  # rows after which a file with few copies is not searched for copies any more
MIN_COPIES = 0.1  # of these rows
INSTALL = "pip install 'datasets>=3'"


class ColumnRow(NamedTuple):
    """A row and its number from 1; see `files.Row`."""

    number: int
    value: dict[str, Any] | None = None
    copy_of: int | None = None


def parquet_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """The file's rows, one row group after another. Raises DataError for a damaged file."""
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, pre_buffer=False) as file:
            for group in range(file.num_row_groups):
                yield from file.iter_batches(BATCH_ROWS, row_groups=[group], use_threads=False)
    except (OSError, ValueError, MemoryError, KeyError, NotImplementedError) as e:  # pyarrow's errors are among these
        raise DataError(f"{path}: a damaged Parquet file, or one that pyarrow cannot read: {e}") from e


def saved_batches(folder: Path) -> Iterator[pa.RecordBatch]:
    """The rows of a folder that `Dataset.save_to_disk` wrote. Raises DataError for a damaged one and for several
    splits, UserError where the package datasets is missing."""
    try:
        import datasets
    except ImportError as e:
        raise UserError(
            f"{folder} is a folder of the package datasets, which is not installed: {INSTALL}; or save the data as"
            " Parquet (Dataset.to_parquet)"
        ) from e
    try:
        loaded = datasets.load_from_disk(str(folder), keep_in_memory=False)
        if isinstance(loaded, datasets.DatasetDict):
            splits = sorted(loaded)
            if len(splits) != 1:
                raise DataError(f"{folder} holds the splits {', '.join(splits)}: give one, {folder / splits[-1]}")
            loaded = loaded[splits[0]]
        for table in loaded.with_format("arrow").iter(BATCH_ROWS):
            yield from table.to_batches()
    except UserError:
        raise
    except Exception as e:  # whatever datasets raises for a folder that is incomplete
        raise DataError(f"{folder}: a damaged folder of the package datasets: {type(e).__name__}: {e}") from e


def rows_of_batches(batches: Iterable[pa.RecordBatch], path: Path) -> Iterator[ColumnRow]:
    """The rows of the batches. Rows that equal an earlier one in all columns are found before they are converted to
    Python values, which takes most of the time, in a file where one row in ten is such a copy."""
    copies: _Copies | None = _Copies()
    originals: np.ndarray[Any, Any] | None
    first = 1
    for batch in batches:
        numbers = np.arange(first, first + batch.num_rows)
        try:
            originals = None if copies is None else copies.originals(batch, first)
            if originals is None or first > COPIES_LOOKED_FOR and copies and copies.found < MIN_COPIES * first:
                copies = None
            originals = numbers if originals is None else originals
            kept = np.flatnonzero(originals == numbers)
            values = iter((batch if len(kept) == batch.num_rows else batch.take(kept)).to_pylist())
        except (ValueError, OSError, MemoryError, OverflowError) as e:  # text that is not UTF-8, dates beyond year 9999
            raise DataError(f"{path}: rows {first} to {first + batch.num_rows - 1} cannot be read: {e}") from e
        for number, original in zip(numbers.tolist(), originals.tolist(), strict=True):
            if original != number:
                yield ColumnRow(number, copy_of=original)
            else:
                yield ColumnRow(number, {name: _plain(value) for name, value in next(values).items()})
        first += batch.num_rows


def _plain(value: Any) -> Any:
    """A column's value as a JSON value: decimals and dates as text, NaN (how pandas writes a missing number) and binary
    data as null."""
    if isinstance(value, str) or value is None:
        return value
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if isinstance(value, decimal.Decimal | datetime.date | datetime.time | datetime.timedelta):
        return str(value)
    return None if isinstance(value, bytes) else value


def _short(value: Any) -> Any:
    """The value, or the digest of a long text: distinct texts of a file may be most of its size."""
    long = isinstance(value, str) and len(value) > 32
    return hashlib.blake2b(value.encode(), digest_size=16).digest() if long else value


class _Copies:
    """Finds the rows that equal an earlier one. A row's key is the code of each of its inner values:

    prompt [{"role": "user", "content": "2 + 2?"}]   answer "4"     codes 0 0 0
    prompt [{"role": "user", "content": "1 + 2?"}]   answer "3"     codes 0 1 1
    """

    def __init__(self) -> None:
        self.found = 0
        self._codes: list[dict[Any, int]] = []  # of each inner column: value -> code
        self._rows: dict[bytes, int] = {}  # key -> number of the first row with it

    def originals(self, batch: pa.RecordBatch, first: int) -> np.ndarray[Any, Any] | None:
        """For each row the number of the first row that equals it, its own if there is none: int64 [rows]. None where
        columns have no such key (lists of several lengths, other types)."""
        if not batch.num_rows:
            return np.zeros(0, dtype=np.int64)
        columns: list[np.ndarray[Any, Any]] = []
        for array in batch.columns:
            keys = self._keys(array, columns_before=len(columns))
            if keys is None:
                return None
            columns += keys
        table = np.ascontiguousarray(np.stack(columns, axis=1))
        keys_of_rows = table.view(np.dtype((np.void, table.dtype.itemsize * table.shape[1]))).ravel()
        unique, index, inverse = np.unique(keys_of_rows, return_index=True, return_inverse=True)
        numbers = [
            self._rows.setdefault(key.tobytes(), first + at) for key, at in zip(unique, index.tolist(), strict=True)
        ]
        originals = np.array(numbers, dtype=np.int64)[inverse]
        self.found += int((originals != np.arange(first, first + batch.num_rows)).sum())
        return originals

    def _keys(self, array: pa.Array, columns_before: int) -> list[np.ndarray[Any, Any]] | None:
        """The codes [rows] of each inner column of a column."""
        import pyarrow as pa

        kind = array.type
        if pa.types.is_struct(kind):
            inner = [array.is_null(), *array.flatten()] if array.null_count else array.flatten()
        elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
            lengths = set(array.value_lengths().to_pylist())
            length = next(iter(lengths))
            if len(lengths) != 1 or not length:
                return None
            flat = array.flatten()
            inner = [flat.take(pa.array(range(at, len(flat), length))) for at in range(length)]
        elif pa.types.is_null(kind):
            return [np.zeros(len(array), dtype=np.int64)]
        elif any(is_kind(kind) for is_kind in (pa.types.is_string, pa.types.is_large_string, pa.types.is_primitive)):
            return [self._coded(array, columns_before)]
        else:
            return None
        found: list[np.ndarray[Any, Any]] = []
        for part in inner:
            keys = self._keys(part, columns_before + len(found))
            if keys is None:
                return None
            found += keys
        return found or [np.zeros(len(array), dtype=np.int64)]

    def _coded(self, array: pa.Array, column: int) -> np.ndarray[Any, Any]:
        while len(self._codes) <= column:
            self._codes.append({})
        codes, encoded = self._codes[column], array.dictionary_encode()
        values = map(_short, encoded.dictionary.to_pylist())
        known = np.array([codes.setdefault(value, len(codes)) for value in values] or [0], dtype=np.int64)
        indices = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
        return np.where(indices < 0, -1, known[indices])

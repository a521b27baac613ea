from __future__ import annotations

import bz2
import datetime
import gzip
import json
import lzma
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from asd_megatron.data.columns import BATCH_ROWS, rows_of_batches
from asd_megatron.data.files import read_rows
from asd_megatron.data.problems import load_problems
from asd_megatron.errors import UserError

ROWS = [{"prompt": f"{i} + 1?", "answer": str(i + 1), "level": i} for i in range(5)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def zstandard(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def parquet(path: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.jsonl.gz", gzip.compress(LINES)),
        ("a.jsonl.bz2", bz2.compress(LINES)),
        ("a.jsonl.xz", lzma.compress(LINES)),
        ("a.jsonl.zst", zstandard(LINES)),
        ("a.json", json.dumps(ROWS).encode()),
        ("a.json", b"\n" + json.dumps(ROWS, indent=1).encode()),
        ("a.json.gz", gzip.compress(json.dumps({"version": 1, "data": ROWS}, indent=2).encode())),
        ("a.json", json.dumps({"data": ROWS}).encode()),
    ],
)
def test_text_files(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    problems = load_problems(tmp_path / name)
    assert [(p.question, p.answer, p.extra["level"]) for p in problems] == [
        (row["prompt"], row["answer"], row["level"]) for row in ROWS
    ]


def test_one_problem_in_a_document_of_its_own(tmp_path: Path) -> None:
    """As in the first release of MATH: a file a problem."""
    for i in range(3):
        document = {"problem": f"P{i}", "level": "Level 1", "type": "Algebra", "solution": f"\\boxed{{{i}}}"}
        (tmp_path / f"{i}.json").write_text(json.dumps(document, indent=4))
    assert (
        [p.answer for p in load_problems(tmp_path)]
        == [p.answer for p in load_problems(tmp_path / "*.json")]
        == list("012")
    )


def test_numbers_and_dates_of_parquet(tmp_path: Path) -> None:
    answers = pa.table(
        {
            "prompt": ["a", "b"],
            "answer": pa.array([27.0, 1.5]),
            "id": pa.array([7, 8]),
            "price": pa.array([Decimal("1.50"), None], pa.decimal128(9, 2)),
            "day": pa.array([datetime.date(2026, 1, 2)] * 2),
            "rate": pa.array([np.nan, 0.5]),
            "image": pa.array([b"\xff", None]),
        }
    )
    pq.write_table(answers, tmp_path / "a.parquet")
    first, second = load_problems(tmp_path / "a.parquet")
    assert [(p.prompt_id, p.answer) for p in (first, second)] == [("7", "27"), ("8", "1.5")]
    assert first.extra == {"price": "1.50", "day": "2026-01-02", "rate": None, "image": None}
    big = parquet(tmp_path / "b.parquet", [{"prompt": "x", "answer": 2**62 + 1}])
    assert load_problems(big).problems[0].answer == str(2**62 + 1)
    endless = parquet(tmp_path / "c.parquet", [{"prompt": "x", "answer": 1.0}, {"prompt": "y", "answer": float("inf")}])
    with pytest.raises(UserError, match=r"c\.parquet: row 2: `answer` is inf"):
        load_problems(endless)


def test_a_folder_of_one_split_and_of_several(tmp_path: Path) -> None:
    """A snapshot of a hub repository."""
    for shard in (0, 1):
        parquet(tmp_path / f"main/data/train-0000{shard}-of-00002.parquet", ROWS[2 * shard : 2 * shard + 2])
    (tmp_path / "main/README.md").write_text("---\n---")
    (tmp_path / "main/dataset_infos.json").write_text("{}")
    assert [p.answer for p in load_problems(tmp_path / "main")] == list("1234")
    shard = (tmp_path / "main/data/train-00001-of-00002.parquet").rename(tmp_path / "blob")
    with pytest.raises(UserError, match=r"^\S+/data has 1 of the 2 files named -of-00002: .*/data/\*\.parquet$"):
        load_problems(tmp_path / "main")
    link = tmp_path / "main/data/train-00001-of-00002.parquet"
    link.symlink_to("../../blob")  # as in the hub's cache
    assert [p.answer for p in load_problems(tmp_path / "main")] == list("1234")
    shard.unlink()
    for name in ("main", "main/data/*.parquet"):
        with pytest.raises(UserError, match=r"train-00001-of-00002\.parquet is a link to a file that does not exist"):
            load_problems(tmp_path / name)
    link.unlink()
    parquet(link, ROWS[2:4])
    parquet(tmp_path / "main/data/test-00000-of-00001.parquet", ROWS[4:])
    with pytest.raises(UserError, match=r"several splits \(test, train\).*main/data/train\*\.parquet"):
        load_problems(tmp_path / "main")
    assert [p.answer for p in load_problems(tmp_path / "main/data/train*.parquet")] == list("1234")
    with pytest.raises(UserError, match=r"without data files.*give one of its folders \(main\)"):
        load_problems(tmp_path)
    with pytest.raises(UserError, match="no file fits this pattern"):
        load_problems(tmp_path / "*.jsonl")


def test_folders_of_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    chosen = datasets.Dataset.from_list(ROWS).select([3, 1])
    chosen.save_to_disk(tmp_path / "one")
    assert [p.answer for p in load_problems(tmp_path / "one")] == ["4", "2"]
    datasets.DatasetDict({"train": chosen, "test": chosen}).save_to_disk(tmp_path / "two")
    with pytest.raises(UserError, match=r"two holds the splits test, train: give one, .*two/train"):
        load_problems(tmp_path / "two")
    assert len(load_problems(tmp_path / "two/train")) == 2
    next((tmp_path / "one").glob("*.arrow")).write_bytes(b"damaged")
    with pytest.raises(UserError, match="a damaged folder of the package datasets"):
        load_problems(tmp_path / "one")


def test_reading_goes_on_after_a_bad_row(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES + b'{"prompt": NaN}\n[1]\n' + LINES)
    errors = [
        row.place.rpartition("/")[2] + " " + (row.error or "") for row in read_rows(tmp_path / "a.jsonl") if row.error
    ]
    assert errors == ["a.jsonl:6 NaN is not JSON", "a.jsonl:7 expected a JSON object, found a list"]
    (tmp_path / "b.json").write_text('[{"prompt": "x", "answer": "1"},\n 5]')
    with pytest.raises(UserError, match=r"b\.json: row 2: expected a JSON object, found a number"):
        load_problems(tmp_path / "b.json")


@pytest.mark.parametrize(
    "columns",
    [
        {"a": ["x", "y", "x", None, "x", None], "b": [-1, -2, -1, 3, -2, 3]},
        {"a": [[{"r": "u", "c": "q"}]] * 3 + [[{"r": "u", "c": "p"}]] * 3, "b": [True, False] * 3},
        {"a": [{"x": None}, None, {"x": None}, {"x": 1}, None, {"x": 1}], "b": [1.5, 2.5, 1.5, 1.5, 2.5, 2.5]},
        {"a": [[1], [1, 2], [1], [1, 2], [], None], "b": [0] * 6},  # no copies are looked for
    ],
)
def test_copies_are_the_rows_that_are_equal(columns: dict[str, list[Any]]) -> None:
    table = pa.table(columns)
    for size in (1, 4, 6):
        rows = list(rows_of_batches(table.to_batches(max_chunksize=size), Path("f")))
        values: list[Any] = []
        for row in rows:
            assert (row.value is None) == (row.copy_of is not None)
            values.append(values[row.copy_of - 1] if row.copy_of is not None else row.value)
            if row.copy_of is None and not any(isinstance(v, list) and len(v) != 1 for v in columns["a"]):
                assert row.value not in values[:-1]
        assert values == table.to_pylist()


def test_copies_over_many_batches(tmp_path: Path) -> None:
    """A file like the published DAPO-Math-17k: each of its rows many times."""
    count, unique = 3 * BATCH_ROWS, 50
    rows = [
        {"prompt": [{"role": "user", "content": f"q{i}"}], "reward_model": {"ground_truth": f"{i}"}}
        for i in range(unique)
    ]
    table = pa.Table.from_pylist(rows).take(
        pa.array(np.random.default_rng(0).permutation(np.resize(np.arange(unique), count)))
    )
    pq.write_table(table, tmp_path / "d.parquet", row_group_size=10_000)
    problems = load_problems(tmp_path / "d.parquet")
    assert sorted(p.answer for p in problems) == sorted(str(i) for i in range(unique))
    assert problems.left_out == {"duplicates": count - unique}
    assert problems.describe().endswith(f"d.parquet, schema verl, 50 problems, {count - unique:,} duplicates left out")

"""Rollout dumps: schema, nulls, metadata, a round trip, and what is refused on reading."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from asd_megatron.errors import UserError
from asd_megatron.observe.dumps import dump_path, read_dump, write_dump
from asd_megatron.records import TokenTable
from tests.observe.batch import CONTEXT, make_examples, make_table


def write(path: Path, table: TokenTable | None = None) -> Path:
    return write_dump(
        path,
        make_examples(),
        make_table() if table is None else table,
        step=7,
        lam=0.5,
        H=0.31,
        h_warm=None,
        temperature=0.7,
        recipe_hash="abc123",
    )


def test_schema_and_metadata(tmp_path: Path) -> None:
    path = dump_path(tmp_path, 7)
    assert path == tmp_path / "rollouts" / "step_000007.parquet"
    write(path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    schema = pq.read_schema(path)
    assert " ".join(schema.names) == (
        "step prompt_id sample prompt_ids response_ids finish_reason reward group_advantage demonstration_source "
        "demonstration_sample teacher_prompt_ids student_logprobs teacher_logprobs reference_logprobs engine_logprobs "
        "student_entropy teacher_entropy pmi advantage divergence reverse_kl forward_kl agreement lambda loss_mask "
        "weight_version version_changes"
    )
    assert schema.field("response_ids").type.value_type == pa.int32()
    assert schema.field("pmi").type.value_type == pa.float32()
    assert schema.field("loss_mask").type.value_type == pa.bool_()
    assert {key.decode(): value.decode() for key, value in schema.metadata.items() if key != b"ARROW:schema"} == {
        "schema_version": "2",
        "step": "7",
        "lambda": "0.5",
        "H": "0.31",
        "H_warm": "null",
        "temperature": "0.7",
        "recipe_hash": "abc123",
    }


def test_a_lambda_for_each_response_is_kept(tmp_path: Path) -> None:
    lambdas = [0.1, -0.02, 0.0, 0.5]
    path = write_dump(
        tmp_path / "d.parquet",
        make_examples(),
        make_table(),
        step=1,
        lam=0.145,
        H=None,
        h_warm=None,
        temperature=1.0,
        recipe_hash="",
        lambdas=lambdas,
    )
    assert read_dump(path).lambdas == lambdas
    assert read_dump(write(tmp_path / "gate.parquet")).lambdas is None
    older = pq.read_table(path).drop_columns(["lambda", "divergence"])
    pq.write_table(older, tmp_path / "older.parquet")
    assert read_dump(tmp_path / "older.parquet").lambdas is None


def test_rows(tmp_path: Path) -> None:
    rows = pq.read_table(write(tmp_path / "d.parquet")).to_pylist()
    assert [row["prompt_id"] for row in rows] == ["p1", "p1", "p2", "p2"]
    first, second, masked, empty = rows
    assert first["step"] == 7 and first["reward"] == 1.0 and first["finish_reason"] == "stop"
    assert first["response_ids"] == [7, 8, 9] and first["pmi"] == [-1.0, 0.5, -0.25]
    assert first["engine_logprobs"] == [-0.5, -1.0, -1.5]
    assert first["weight_version"] == 4 and first["teacher_prompt_ids"] == [1, 2, 99, 3]
    assert second["loss_mask"] == [True, False] and second["demonstration_source"] == "group"
    for name in ("teacher_prompt_ids", "teacher_logprobs", "teacher_entropy", "pmi"):
        assert masked[name] is None, name
    assert masked["student_logprobs"] == pytest.approx([-0.1, -0.2, -0.3, -0.4])
    assert masked["advantage"] == [0, 0, 0, 0] and masked["demonstration_source"] == "none"
    assert empty["response_ids"] == [] and empty["pmi"] == []


def test_columns_that_were_not_computed_are_null(tmp_path: Path) -> None:
    table = make_table(teacher=False)
    del table.columns["student_entropy"]
    rows = pq.read_table(write(tmp_path / "d.parquet", table)).to_pylist()
    for name in ("teacher_logprobs", "teacher_entropy", "pmi", "student_entropy"):
        assert [row[name] for row in rows] == [None] * 4, name
    # u of the student alone needs no context
    table["pmi"] = -table["student_logprobs"]
    rows = pq.read_table(write(tmp_path / "d.parquet", table)).to_pylist()
    assert rows[2]["pmi"] == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_round_trip(tmp_path: Path) -> None:
    path = write(tmp_path / "d.parquet")
    dump = read_dump(path)
    assert (dump.info.step, dump.info.lam, dump.info.H, dump.info.h_warm) == (7, 0.5, 0.31, None)
    assert (dump.info.temperature, dump.info.recipe_hash) == (0.7, "abc123")
    assert [e.rollout.version_changes for e in dump.examples] == [(), (), ((1, 5), (3, 6)), ()]
    table = make_table()
    for got, expected in zip(dump.examples, make_examples(), strict=True):
        assert tuple(got.rollout.logprobs) == pytest.approx(expected.rollout.logprobs)
        assert tuple(got.rollout.response_ids) == tuple(expected.rollout.response_ids)
        assert tuple(got.rollout.loss_mask) == tuple(expected.rollout.loss_mask)
        assert got.rollout.finish_reason is expected.rollout.finish_reason
        assert got.demonstration_source is expected.demonstration_source
        assert got == dataclasses.replace(expected, rollout=got.rollout)
    has_context = table.spread(torch.tensor(CONTEXT))
    assert dump.table.offsets.tolist() == table.offsets.tolist()
    for name in ("student_logprobs", "student_entropy", "advantage"):
        assert torch.equal(dump.table[name], table[name]), name
    for name in ("teacher_logprobs", "teacher_entropy", "pmi"):
        assert torch.equal(dump.table[name][has_context], table[name][has_context]), name
        assert dump.table[name][~has_context].isnan().all(), name


def test_absent_columns_stay_absent(tmp_path: Path) -> None:
    dump = read_dump(write(tmp_path / "d.parquet", make_table(teacher=False)))
    assert "pmi" not in dump.table and "teacher_entropy" not in dump.table and "engine_logprobs" in dump.table


def test_mismatched_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the examples differ"):
        write(tmp_path / "d.parquet", TokenTable.for_lengths([3, 2, 4, 1]))
    assert list(tmp_path.iterdir()) == []


def rewrite(path: Path, **change: object) -> None:
    table = pq.read_table(path)
    if "version" in change:
        table = table.replace_schema_metadata({**table.schema.metadata, b"schema_version": str(change["version"])})
    if "without" in change:
        table = table.drop_columns([str(change["without"])])
    if "metadata" in change:
        table = table.replace_schema_metadata(change["metadata"])  # type: ignore[arg-type]
    if "responses" in change:
        column = pa.array(change["responses"], pa.list_(pa.int32()))
        table = table.set_column(table.schema.get_field_index("response_ids"), "response_ids", column)
    pq.write_table(table, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 1}, r"schema version 1; this version of asd_megatron reads 2: read it with the version"),
        ({"metadata": None}, "no rollout dump: it has no schema_version"),
        ({"metadata": {"schema_version": "2", "step": "3"}}, "lacks lambda, H, H_warm, temperature, recipe_hash"),
        ({"without": "pmi"}, r"lacks the column\(s\) pmi"),
        ({"responses": [[1], [1], [1], []]}, "a row is damaged"),
    ],
)
def test_refused_on_reading(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = write(tmp_path / "d.parquet")
    rewrite(path, **change)
    with pytest.raises(UserError, match=message):
        read_dump(path)


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist; dumps are written with `run.dump_rollouts: true`"):
        read_dump(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("hello")
    with pytest.raises(UserError, match="not a readable Parquet file"):
        read_dump(tmp_path / "text.parquet")

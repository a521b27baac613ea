"""A cell's record, and whether a cell that has run is still the one that the study asks for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from asd_megatron.errors import UserError
from asd_megatron.study.cells import CELL_FILE, changed_keys, check_unchanged, log_tail, read_record, write_record
from asd_megatron.study.plan import Cell, plan_cells
from asd_megatron.study.schema import make_study
from tests.study.world import record, study_values


@pytest.fixture
def cell(tmp_path: Path) -> Cell:
    return plan_cells(make_study(study_values(tmp_path)))[0]


def kept(cell: Cell) -> None:
    known = record(cell.key, recipe_hash=cell.hash, recipe=cell.recipe.model_dump(mode="json"))
    write_record(cell.folder, known)


def test_a_record_comes_back(cell: Cell) -> None:
    assert check_unchanged(cell) is None
    kept(cell)
    found = check_unchanged(cell)
    assert found is not None and found == read_record(cell.folder)
    assert (found.arm, found.start, found.seed, found.status) == ("grpo", "default", 1, "finished")


def test_a_changed_recipe_is_refused_with_what_to_do(cell: Cell, tmp_path: Path) -> None:
    kept(cell)
    changed = plan_cells(make_study(study_values(tmp_path, overrides={"gate.tau_down": 0.9})))[0]
    with pytest.raises(
        UserError, match=r"grpo/default/seed_1 .*gate.tau_down: 0.93 -> 0.9.*change the study file back"
    ):
        check_unchanged(changed)


def test_a_key_that_is_new_in_the_schema_counts_with_its_default(cell: Cell) -> None:
    old = cell.recipe.model_dump(mode="json")
    del old["gate"]["tau_up"]
    known = record(cell.key, recipe_hash="of an older version", recipe=old)
    assert changed_keys(cell, known) == []
    old["gate"]["tau_up"] = 1.1
    assert changed_keys(cell, known) == ["gate.tau_up: 1.1 -> 1.0"]
    old["gate"]["gone"] = 1
    assert "no longer a recipe" in changed_keys(cell, known)[0]


def test_a_file_that_is_no_record(cell: Cell) -> None:
    cell.folder.mkdir(parents=True)
    for text in ("{", "[]", '{"arm": "a"}'):
        (cell.folder / CELL_FILE).write_text(text)
        with pytest.raises(UserError, match="is not a cell's record"):
            read_record(cell.folder)


def test_the_last_lines_of_a_log(cell: Cell) -> None:
    assert log_tail(cell.folder) == ()
    cell.folder.mkdir(parents=True)
    (cell.folder / "log.txt").write_bytes(b"one\n\ntwo\xff\nthree\n\n")
    assert log_tail(cell.folder, 2) == ("two�", "three")


def test_the_hash_is_of_the_recipe(cell: Cell) -> None:
    assert replace(cell, overrides={}).hash == cell.hash

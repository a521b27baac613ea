"""Cells: their order, their recipes and their command lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from asd_megatron.config import load_recipe
from asd_megatron.config.overrides import split_overrides
from asd_megatron.config.yaml_text import parse_yaml
from asd_megatron.errors import UserError
from asd_megatron.study.plan import cell_keys, override_arguments, plan_cells
from asd_megatron.study.schema import make_study
from tests.study.world import study_values


def test_seeds_are_outermost_and_arms_innermost(tmp_path: Path) -> None:
    values = study_values(tmp_path, seeds=[2, 1], starts={"a": {}, "b": {}})
    values["arms"]["late"] = {"seeds": [1, 7], "starts": ["b"]}
    keys = list(map(str, cell_keys(make_study(values))))
    assert keys == [
        *("grpo/a/seed_2", "antisd/a/seed_2", "grpo/b/seed_2", "antisd/b/seed_2"),
        *("grpo/a/seed_1", "antisd/a/seed_1", "grpo/b/seed_1", "antisd/b/seed_1", "late/b/seed_1"),
        "late/b/seed_7",
    ]
    assert [str(key) for key in cell_keys(make_study(values), ["late"])] == ["late/b/seed_1", "late/b/seed_7"]
    with pytest.raises(UserError, match="no arm 'lat': did you mean 'late'"):
        cell_keys(make_study(values), ["lat"])


def test_a_cell_is_an_ordinary_run(tmp_path: Path) -> None:
    values = study_values(
        tmp_path,
        overrides={"run.steps": 5, "algorithm.lambda_max": 0.1},
        starts={"s": {"algorithm.lambda_max": 0.2, "gate.tau_down": 0.5}},
        arms={"a": {"overrides": {"gate.tau_down": 0.6}}},
    )
    (cell,) = plan_cells(make_study(values))
    recipe = cell.recipe
    assert (recipe.run.steps, recipe.algorithm.lambda_max, recipe.gate.tau_down) == (
        5,
        0.2,
        0.6,
    )  # the arm has the last word
    assert (recipe.run.seed, recipe.run.name, recipe.run.path) == (1, "a-s-1", cell.run_folder)
    assert cell.run_folder == tmp_path / "studies/small/cells/a/s/seed_1/run"
    assert load_recipe(cell.arguments[0], cell.arguments[1:]) == recipe


def test_a_recipe_that_is_refused_names_its_cell(tmp_path: Path) -> None:
    study = make_study(study_values(tmp_path, arms={"a": {"overrides": {"algorithm.lamda_max": 1.0}}}))
    with pytest.raises(UserError, match="cell a/default/seed_1: .*nearest valid one is algorithm.lambda_max"):
        plan_cells(study)


@pytest.mark.parametrize(
    "value",
    ["puzzle:train", "null", "true", "3", "", "a b", 'say "so"\n', "é", "--x", None, True, 3, 1e-6, [1, "2"], {"a": 1}],
)
def test_values_come_back_from_the_command_line(value: Any) -> None:
    ((key, text),) = split_overrides(override_arguments({"data.train": value}))
    assert key == "data.train" and parse_yaml(text, "x") == value

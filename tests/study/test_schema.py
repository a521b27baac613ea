"""The study file: what is refused and what it says; the examples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from asd_megatron.errors import UserError
from asd_megatron.study.plan import plan_cells
from asd_megatron.study.schema import load_study, make_study
from tests.study.world import study_values

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples" / "studies").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_the_example_studies_are_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    cells = plan_cells(load_study(path))
    assert len({cell.hash for cell in cells}) == len(cells) > 1


def test_the_puzzle_study_is_the_promised_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    cells = plan_cells(load_study(ROOT / "examples" / "studies" / "puzzle.yaml"))
    assert len(cells) == 60
    assert {cell.recipe.algorithm.name for cell in cells} == {cell.key.arm for cell in cells}
    assert {(cell.recipe.run.steps, cell.recipe.parallelism.ranks) for cell in cells} == {(200, 1)}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"armz": {}}, "armz: unknown key; the nearest valid one is arms"),
        ({"arms": {"a": {"overides": {}}}}, "arms.a.overides: unknown key; the nearest valid one is arms.a.overrides"),
        ({"target": {"at_last": 0.5}}, "target.at_last: unknown key; the nearest valid one is target.at_least"),
        ({"target": {}}, "target.at_least: missing"),
        ({"arms": {}}, "arms: "),
        ({"seeds": []}, "seeds: expected at least one entry, and none twice"),
        ({"seeds": [1, 1]}, "seeds: expected at least one entry, and none twice"),
        ({"seeds": [-1]}, "seeds.0: "),
        ({"seeds": ["1"]}, "seeds.0: "),
        ({"parallel": 0}, "parallel: "),
        ({"arms": {"../up": {}}}, "a name has letters, digits"),
        ({"name": "a/b"}, "name: a name has letters, digits"),
        ({"baseline": "grp"}, "baseline: no arm 'grp': did you mean 'grpo'?"),
        ({"arms": {"a": {"starts": ["shiped"]}}, "starts": {"shipped": {}}}, "did you mean 'shipped'?"),
        ({"overrides": {"run.seed": 1}}, "overrides: run.seed is set by the study"),
        ({"starts": {"s": {"run.folder": "x"}}}, "starts.s: run.folder is set by the study"),
        ({"arms": {"a": {"overrides": {"steps": 1}}}}, "arms.a.overrides: 'steps' is no recipe key"),
    ],
)
def test_refusals(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        make_study(study_values(tmp_path, **changed), "study x.yaml")
    assert str(error.value).startswith("study x.yaml:") and message in str(error.value)


def test_files_that_are_no_study(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_study(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("[1]")
    with pytest.raises(UserError, match="expected keys such as"):
        load_study(tmp_path / "list.yaml")


def test_defaults(tmp_path: Path) -> None:
    study = make_study(study_values(tmp_path))
    assert (study.baseline_arm, study.starts_of("antisd"), study.seeds_of("antisd")) == ("grpo", ("default",), (1,))
    assert study.path == tmp_path / "studies" / "small"

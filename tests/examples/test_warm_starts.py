"""examples/studies/make_warm_starts.py: what it asks for is a recipe, and a start that is not fit is told."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from asd_megatron.config import load_recipe
from asd_megatron.study.schema import load_study
from tests.e2e.world import ROOT
from tests.examples.scripts import script


@pytest.fixture
def warm_starts() -> ModuleType:
    return script("studies/make_warm_starts.py")


def test_the_study_starts_where_the_script_writes(warm_starts: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    commands: list[list[str]] = []
    monkeypatch.setattr(warm_starts, "write_initial_model", lambda folder, seed: Path(folder))
    monkeypatch.setattr(warm_starts.subprocess, "run", lambda command, check: commands.append(command))
    monkeypatch.setattr(warm_starts, "STEPS", 2251)  # a folder that is not there
    folders = [warm_starts.make(suffix, seed) for suffix, seed in warm_starts.SEEDS.items()]
    recipes = [load_recipe(command[4], command[5:], kind="sft") for command in commands]
    assert [recipe.run.path for recipe in recipes] == folders
    assert [recipe.run.seed for recipe in recipes] == list(warm_starts.SEEDS.values())
    starts = load_study(ROOT / "examples/studies/puzzle.yaml").starts
    assert {s["model.path"] for s in starts.values()} == {
        "puzzle:warm_start",
        *(f"{f}/hf/step_002250" for f in folders),
    }


@pytest.mark.parametrize(("accuracy", "tested", "status"), [(0.21, 0.99, 0), (0.21, 0.84, 1), (0.6, 0.99, 1)])
def test_the_check(warm_starts: ModuleType, tmp_path: Path, accuracy: float, tested: float, status: int) -> None:
    found = {"accuracy": accuracy, "length_mean": 9.0, "verified": 0.1, "accuracy_verified": tested}
    summary = {"evaluation_after": {f"evaluation/{name}": value for name, value in found.items()}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert warm_starts.check(tmp_path) == status

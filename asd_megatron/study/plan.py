"""From a study to its cells: every cell's recipe, folder and command line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asd_megatron.config import Recipe, load_recipe, recipe_hash
from asd_megatron.errors import UserError
from asd_megatron.study.schema import Study, no_such

PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_:/.-]*")  # needs no quotes on a command line, unless YAML reads it otherwise
NOT_TEXT = ("true", "false", "null")


@dataclass(frozen=True)
class CellKey:
    """Which cell: what is measured once. Written `antisd/shipped/seed_1`, which is its place in the study's folder."""

    arm: str
    start: str
    seed: int

    def __str__(self) -> str:
        return f"{self.arm}/{self.start}/seed_{self.seed}"


@dataclass(frozen=True, eq=False)
class Cell:
    """An ordinary run: `asd-megatron train RECIPE --overrides`."""

    key: CellKey
    folder: Path
    recipe_path: str
    overrides: Mapping[str, Any]  # those of the study, of the start and of the arm, and the study's own keys
    recipe: Recipe  # resolved

    @property
    def run_folder(self) -> Path:
        return self.folder / "run"

    @property
    def hash(self) -> str:
        return recipe_hash(self.recipe)

    @property
    def arguments(self) -> list[str]:
        """What follows `asd-megatron train`."""
        return [self.recipe_path, *override_arguments(self.overrides)]


def override_arguments(overrides: Mapping[str, Any]) -> list[str]:
    """`{"run.steps": 2}` -> `["--run.steps=2"]`; values as YAML that the command line reads back equal."""
    return [f"--{key}={_yaml(value)}" for key, value in overrides.items()]


def _yaml(value: Any) -> str:
    if isinstance(value, str) and PLAIN.fullmatch(value) and value.lower() not in NOT_TEXT:
        return value
    return json.dumps(value, ensure_ascii=False)  # JSON is YAML, and quoted text is read as YAML for every key


def cell_keys(study: Study, only: Iterable[str] | None = None) -> list[CellKey]:
    """The study's cells in the order in which they run: seeds outermost, arms innermost, so that a study that is
    stopped early is balanced. `only` keeps some arms; raises UserError for an arm that is not there."""
    wanted = list(study.arms) if only is None else list(only)
    for arm in wanted:
        if arm not in study.arms:
            raise UserError(f"--only: {no_such('arm', arm, study.arms)}")
    arms = [arm for arm in study.arms if arm in wanted]
    seeds = dict.fromkeys([*study.seeds, *(seed for arm in study.arms for seed in study.seeds_of(arm))])
    return [
        CellKey(arm, start, seed)
        for seed in seeds
        for start in study.starts
        for arm in arms
        if seed in study.seeds_of(arm) and start in study.starts_of(arm)
    ]


def make_cell(study: Study, key: CellKey) -> Cell:
    """One cell with its recipe. Raises UserError, naming the cell, for what the recipe refuses."""
    folder = study.path / "cells" / key.arm / key.start / f"seed_{key.seed}"
    overrides = {
        **study.overrides,
        **study.starts[key.start],
        **study.arms[key.arm].overrides,
        "run.name": f"{key.arm}-{key.start}-{key.seed}",
        "run.folder": str(folder / "run"),
        "run.seed": key.seed,
        "run.overwrite": True,
    }
    try:
        recipe = load_recipe(study.recipe, override_arguments(overrides))
    except UserError as error:
        raise UserError(f"study {study.name}, cell {key}: {error}") from None
    return Cell(key, folder, study.recipe, overrides, recipe)


def plan_cells(study: Study, only: Iterable[str] | None = None) -> list[Cell]:
    """`cell_keys` with their recipes, all checked before anything runs."""
    return [make_cell(study, key) for key in cell_keys(study, only)]

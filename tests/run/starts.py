"""Starts in a run folder without a model, for the tests of what they find there."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from asd_megatron.checkpoint import lineage
from asd_megatron.config import AnyRecipe, make_recipe
from asd_megatron.errors import UserError
from asd_megatron.files import write_json
from asd_megatron.run.folder import Start, claim, prepare


def recipe(folder: Path, *overrides: str) -> AnyRecipe:
    values = {"model": {"path": "/models/m"}, "data": {"train": "d.jsonl"}, "run": {"folder": str(folder), "steps": 6}}
    return make_recipe(values, ["--checkpoint.export_at_end", "false", *overrides])


def begin(folder: Path, *overrides: str, stage: str = "train") -> Start:
    """Claim and prepare the folder, as a run that is then killed."""
    asked = recipe(folder, *overrides)
    with ExitStack() as closing:
        start = claim(asked, stage, closing)
        if start.kind != "finished":
            step = int(start.checkpoint[-6:]) if start.kind == "resume" and start.checkpoint else 0
            prepare(asked, start, stage, step)
            (folder / "metrics.jsonl").touch()
    return start


def refusal(folder: Path, *overrides: str, stage: str = "train") -> str:
    before = contents(folder)
    with pytest.raises(UserError) as caught:
        begin(folder, *overrides, stage=stage)
    assert contents(folder) == before
    return str(caught.value)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def checkpoint(folder: Path, step: int) -> Path:
    path = folder / "checkpoints" / lineage.name(step)
    path.mkdir(parents=True)
    (path / lineage.RUN_STATE).write_text("{}")
    lineage.name_latest(folder / "checkpoints", path.name)
    return path


def complete(folder: Path, steps: int = 6) -> None:
    write_json(folder / "summary.json", {"completed": True, "steps": steps})

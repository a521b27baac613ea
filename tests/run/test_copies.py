"""Where the initial weights come from when a checkpoint stores none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from asd_megatron.config import Recipe, make_recipe
from asd_megatron.errors import UserError
from asd_megatron.run.copies import check_missing


def penalised(model: str) -> Recipe:
    recipe: Any = make_recipe({"model": {"path": model}, "data": {"train": "t"}}, ["--algorithm.kl_coefficient=0.1"])
    return recipe


def run(folder: Path, model: str, *events: dict[str, Any]) -> str:
    """A run's folder; returns the path of its checkpoint."""
    checkpoint = folder / "checkpoints" / "step_000002"
    checkpoint.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(f"model: {{path: {model}}}\n")
    (folder / "history.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return str(checkpoint)


def test_the_initial_weights_are_those_with_which_the_training_began(tmp_path: Path) -> None:
    """Not those of the latest recipe: a resumed run reads only the shapes from its `model.path`."""
    changed = {"event": "change", "step": 2, "key": "model.path", "old": "first", "new": "second"}
    own = run(tmp_path / "own", "second", {"event": "fresh", "checkpoint": None}, {"event": "resume"}, changed)
    forked = run(tmp_path / "forked", "third", {"event": "fresh", "checkpoint": own}, {"event": "resume"})
    older = run(tmp_path / "older", "first")  # a run without a history
    for checkpoint in (own, forked, older):
        assert "those of model.path first" in (check_missing(penalised("first"), Path(checkpoint), []) or "")
        for other in ("second", "third"):
            with pytest.raises(UserError, match="its training began from first"):
                check_missing(penalised(other), Path(checkpoint), [])

    restart = {"event": "restart", "checkpoint": None}
    again = run(tmp_path / "again", "second", changed, restart, {**changed, "step": 0})  # before the first step
    assert check_missing(penalised("second"), Path(again), []) is not None
    gone = run(tmp_path / "gone", "first", {"event": "fresh", "checkpoint": str(tmp_path / "x" / "y" / "z")})
    circle = tmp_path / "circle" / "checkpoints" / "step_000002"
    run(tmp_path / "circle", "first", {"event": "overwrite", "checkpoint": str(circle)})
    for checkpoint in (gone, str(circle)):
        with pytest.raises(UserError, match=r"recipe\.yaml of the run that began"):
            check_missing(penalised("first"), Path(checkpoint), [])

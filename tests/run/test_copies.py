"""Whose weights are the initial ones, when a checkpoint stores no copy of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from asd_megatron.errors import UserError
from asd_megatron.run.copies import check_missing
from tests.run.starts import begin, checkpoint, recipe

PENALTY = ["--algorithm.kl_coefficient", "0.1"]


def missing(path: Path, model: str) -> str | None:
    asked = recipe(path.parent / "unused", "--model.path", model, *PENALTY)
    return check_missing(asked, path, [])


def refused(path: Path, model: str) -> str:
    with pytest.raises(UserError) as caught:
        missing(path, model)
    return str(caught.value)


def test_the_first_model_path_counts(tmp_path: Path) -> None:
    """Not the last one, of a run that was moved to another model folder, or that started from another run's weights."""
    first, second = tmp_path / "first", tmp_path / "second"
    begin(first)
    saved = checkpoint(first, 2)
    assert "initial weights: those of model.path /models/m" in str(missing(saved, "/models/m"))
    assert "first trained from /models/m, not from model.path /models/other" in refused(saved, "/models/other")

    begin(first, "--model.path", "/models/other", "--checkpoint.accept_changes", "model.path")
    saved = checkpoint(first, 4)
    assert missing(saved, "/models/m") and "first trained from /models/m" in refused(saved, "/models/other")

    begin(second, "--model.path", "/models/other", "--checkpoint.resume", str(saved))
    later = checkpoint(second, 5)
    assert missing(later, "/models/m") and "first trained from /models/m" in refused(later, "/models/other")

    (first / "recipe.yaml").unlink()
    (first / "history.jsonl").unlink()
    assert "cannot be read: set model.path as it was" in refused(later, "/models/m")


def test_a_checkpoint_with_the_copies_needs_no_history(tmp_path: Path) -> None:
    asked = recipe(tmp_path / "unused", *PENALTY)
    assert check_missing(asked, tmp_path / "nowhere" / "step_000001", ["initial"]) is None

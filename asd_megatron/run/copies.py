"""The copies of weights that a recipe needs, and those that the checkpoint it resumes from lacks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from asd_megatron.config import AnyRecipe, Recipe
from asd_megatron.config.yaml_text import read_yaml
from asd_megatron.errors import UserError
from asd_megatron.models.port import ModelPort
from asd_megatron.models.weight_copies import CopyName, WeightCopies
from asd_megatron.run import folder as folders
from asd_megatron.run.history import read_history


def needed_copies(recipe: AnyRecipe) -> list[CopyName]:
    """The copies that the teacher and the KL penalty are scored with."""
    if not isinstance(recipe, Recipe):
        return []
    weights = recipe.teacher.weights
    names: list[CopyName] = []
    if weights == "initial" or recipe.algorithm.kl_coefficient > 0:
        names.append("initial")
    if weights == "ema":
        names.append("ema")
    return names


def weight_copies(recipe: AnyRecipe, port: ModelPort) -> WeightCopies | None:
    """Those copies of the port's weights, which are still `model.path`'s; None when the recipe needs none."""
    names = needed_copies(recipe)
    if not names:
        return None
    rate = recipe.teacher.ema_rate if isinstance(recipe, Recipe) and "ema" in names else None
    return WeightCopies(port, initial="initial" in names, ema_rate=rate)


def check_missing(recipe: AnyRecipe, checkpoint: Path, stored: Sequence[str]) -> str | None:
    """A line for the console when the initial weights are those of `model.path`, because the checkpoint stores none.

    They are the same when the checkpoint's training began from the same `model.path`. Raises UserError when that
    is not known, and for a moving average, which nothing but the checkpoint has.
    """
    missing = [name for name in needed_copies(recipe) if name not in stored]
    if "ema" in missing:
        raise UserError(
            f"teacher.weights ema: {checkpoint} stores no moving average, it was made without one; set teacher.weights"
            " to what it was, or start a new run with that run's exported weights (RUN/hf/step_NNNNNN) as model.path"
        )
    if not missing:
        return None
    recorded = _model_path(checkpoint)
    if recorded is None or Path(recorded).resolve() != Path(recipe.model.path).resolve():
        unknown = "the recipe.yaml of the run that began its training cannot be read"
        was = unknown if recorded is None else f"its training began from {recorded}"
        raise UserError(
            f"{checkpoint} stores no copy of the initial weights, and {was}: set model.path as it was, or"
            " teacher.weights live and algorithm.kl_coefficient 0"
        )
    return f"initial weights: those of model.path {recipe.model.path} (the checkpoint was made without a copy of them)"


def _model_path(checkpoint: Path, before: frozenset[Path] = frozenset()) -> str | None:
    """`model.path` of the run whose training led to RUN/checkpoints/step_NNNNNN: that with which RUN began or, if it
    began from another run's checkpoint, that of the other. None when it is not known. `before`: runs already seen."""
    try:
        run = checkpoint.resolve().parents[1]
        if run in before:
            return None
        events = read_history(run)
        begun = [i for i, event in enumerate(events) if event.get("event") in folders.BEGINNINGS]
        events = events[begun[-1] if begun else 0 :]
        if begun and events[0].get("checkpoint") is not None:
            return _model_path(Path(events[0]["checkpoint"]), before | {run})
        for event in events:
            if event.get("event") == "change" and event.get("key") == "model.path" and event.get("step"):
                return str(event["old"])
        return str(read_yaml(run / folders.RECIPE_FILE, "recipe")["model"]["path"])
    except (UserError, OSError, IndexError, KeyError, TypeError):
        return None

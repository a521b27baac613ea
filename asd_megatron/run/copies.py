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

    They are the same when the checkpoint's weights were first trained from the same `model.path`. Raises UserError when
    that is not known, and for a moving average, which nothing but the checkpoint has.
    """
    missing = [name for name in needed_copies(recipe) if name not in stored]
    if "ema" in missing:
        raise UserError(
            f"teacher.weights ema: {checkpoint} stores no moving average, it was made without one; set teacher.weights"
            " to what it was, or start a new run with that run's exported weights (RUN/hf/step_NNNNNN) as model.path"
        )
    if not missing:
        return None
    first = _first_model_path(checkpoint)
    if first is None or Path(first).resolve() != Path(recipe.model.path).resolve():
        was = f"its weights were first trained from {first}, not from model.path {recipe.model.path}"
        if first is None:
            was = "the recipe.yaml of the run that trained its weights first cannot be read"
        raise UserError(
            f"{checkpoint} stores no copy of the initial weights, and {was}: set model.path as it was, or"
            " teacher.weights live and algorithm.kl_coefficient 0"
        )
    return f"initial weights: those of model.path {recipe.model.path} (the checkpoint was made without a copy of them)"


def _first_model_path(checkpoint: Path) -> str | None:
    """`model.path` at the first step of the weights in RUN/checkpoints/step_NNNNNN: before it was changed in the middle
    of that run, or of the run whose checkpoint that one started from. None when it is not known."""
    run = checkpoint.resolve().parent.parent
    events = folders.read_history(run)
    begun = max((i for i, event in enumerate(events) if event.get("event") in folders.BEGINNINGS), default=0)
    if events and events[begun].get("checkpoint") is not None:
        return _first_model_path(Path(str(events[begun]["checkpoint"])))
    for event in events[begun:]:
        if event.get("event") == "change" and event.get("key") == "model.path" and event.get("step"):
            return str(event.get("old"))
    try:
        return str(read_yaml(run / folders.RECIPE_FILE, "recipe")["model"]["path"])
    except (UserError, OSError, KeyError, TypeError):
        return None

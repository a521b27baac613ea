"""The prompts of a recipe's steps as text and ids, for programs that are compared with ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from step.conditions import overrides

from asd_megatron.config import load_recipe
from asd_megatron.data.tokenizer import decode
from asd_megatron.run.build import make_renderer
from asd_megatron.run.session import open_session
from asd_megatron.run.sources import model_folder, training_problems


def collect(spec: dict[str, Any]) -> dict[str, Any]:
    """`spec`: recipe, overrides, steps, folder. Prompts in the order of the steps, and the model's folder."""
    recipe = load_recipe(spec["recipe"], overrides(Path(spec["folder"]) / "run", spec["steps"], spec["overrides"]))
    with open_session(recipe) as session:
        renderer = make_renderer(recipe, session.tokenizer, session.end_ids)
        problems = training_problems(recipe.data)
        per_step = recipe.sampling.problems_per_step
        found = [
            renderer.student(problem).ids
            for step in range(1, spec["steps"] + 1)
            for problem in problems.batch(step, per_step, recipe.run.seed)
        ]
        texts = [decode(session.tokenizer, ids, skip_special_tokens=False) for ids in found]
    return {"model": str(Path(model_folder(recipe.model.path)).resolve()), "ids": found, "texts": texts}


CELLS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"prompts": collect}

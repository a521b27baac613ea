"""Recipes of runs of the built-in puzzle and its model, small enough for a step to take a fraction of a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


def write_recipe(path: Path, **sections: dict[str, Any]) -> Path:
    """Write a recipe to `path`, with the keys given put into its sections; its run folder is `run` beside it."""
    content: dict[str, dict[str, Any]] = {
        "run": {"folder": str(path.parent / "run")},
        "model": {"path": "puzzle:warm_start"},
        "sampling": {
            "problems_per_step": 2,
            "rollouts_per_problem": 4,
            "max_prompt_tokens": 64,
            "max_response_tokens": 16,
        },
        "data": {"train": "puzzle:train"},
        "reward": {"name": "puzzle"},
        "checkpoint": {"export_at_end": False},
        "logging": {"progress": False, "tensorboard": False, "curves": False},
    }
    for section, keys in sections.items():
        content[section] = {**content.get(section, {}), **keys}
    path.write_text(yaml.safe_dump(content))
    return path

"""`config.json` files of models as published, by the name of the model: shapes that can be planned with, and tested,
without the model's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """The models whose config is here, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def config_of(name: str) -> dict[str, Any] | None:
    """The config of a model by the last part of its name, upper and lower case alike (`Qwen/Qwen3-8B`,
    `models/qwen3-8b`); None for others."""
    wanted = name.rstrip("/").rpartition("/")[2].lower()
    for path in FOLDER.glob("*.json"):
        if path.stem.lower() == wanted:
            loaded: dict[str, Any] = json.loads(path.read_text())
            return loaded
    return None

"""Short names of runs for legends, from their folders."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import yaml

DEFAULT_NAME = "run"  # of a recipe without run.name, and of the run folders of a study: it names no run
LENGTH = 28  # characters of a name


def run_names(*folders: str | os.PathLike[str]) -> list[str]:
    """A name for each run, all different: `run.name` of the recipes where that tells the runs apart, else the last
    parts of the paths that do. For instance `antisd` and `grpo` for a/antisd/run and a/grpo/run."""
    paths = [Path(folder).resolve() for folder in folders]
    names = [_recorded_name(path) for path in paths]
    if not _different(names) or any(name in ("", DEFAULT_NAME) for name in names):
        names = _parts(paths)
    names = [_short(name) for name in names]
    return names if _different(names) else [f"{name} ({number})" for number, name in enumerate(names, 1)]


def _different(values: Sequence[object]) -> bool:
    return len(set(values)) == len(values)


def _recorded_name(folder: Path) -> str:
    """`run.name` of the run folder's recipe; empty without a readable one."""
    try:
        return str(yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))["run"]["name"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError, yaml.YAMLError):
        return ""


def _parts(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, after those that several of them end with have been left out."""
    parts = [[part for part in path.parts[1:] if part != DEFAULT_NAME] or [path.name] for path in paths]
    if _different([tuple(own) for own in parts]):
        while not _different([own[-1] for own in parts]) and all(len(own) > 1 for own in parts):
            for own in parts:
                own.pop()
    return [own[-1] for own in parts]


def _short(name: str) -> str:
    """The name without its middle if it is a long one."""
    half = (LENGTH - 3) // 2
    return name if len(name) <= LENGTH else f"{name[:half]}...{name[-half:]}"

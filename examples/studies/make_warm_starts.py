"""Two more warm starts of the search puzzle for examples/studies/puzzle.yaml, made as the shipped one was
(docs/puzzle.md, "The warm-start corpus"), but with other seeds of the initial weights, the corpus and its order.

    python examples/studies/make_warm_starts.py

writes runs/puzzle-warm-start-2 and runs/puzzle-warm-start-3 (one after the other, some minutes each on one CPU core),
continues one that was interrupted, leaves finished ones alone, and then checks each: exit status 1 if one is not
fit to start from.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from asd_megatron.puzzle.model import write_initial_model

RECIPE = "examples/puzzle/warm_start.yaml"
STEPS = 2250
# Folder suffix -> seed; the shipped start has seed 0. Seeds 2 and 3 failed the check: the habit steps unlearned to copy
# the tested candidate after `So` (accuracy of tested answers 0.84 and 0.29).
SEEDS = {"2": 1, "3": 4}
SAMPLES = 8  # for each of the 500 held-out puzzles: one response in nine is tested, and the check is about those
ACCURACY = (0.14, 0.30)  # it gives up early, and guesses
ACCURACY_TESTED = 0.96  # weak arithmetic would cap what reinforcement can reach


def main() -> int:
    """Make and check both; returns the exit status."""
    folders = [make(suffix, seed) for suffix, seed in SEEDS.items()]
    return max([check(folder) for folder in folders])


def make(suffix: str, seed: int) -> Path:
    """The run folder of one warm start, trained unless its model is there already."""
    folder = Path("runs") / f"puzzle-warm-start-{suffix}"
    if (folder / "hf" / f"step_{STEPS:06d}").is_dir():
        return folder
    initial = write_initial_model(f"runs/puzzle-initial-{suffix}", seed=seed)
    keys = {
        "run.name": folder.name,
        "run.seed": seed,
        "run.steps": STEPS,
        "model.path": initial,
        "evaluation.every": 0,
        "evaluation.at_start": "false",
        "evaluation.samples": SAMPLES,
    }
    overrides = [f"--{key}={value}" for key, value in keys.items()]
    subprocess.run([sys.executable, "-m", "asd_megatron.cli.main", "sft", RECIPE, *overrides], check=True)
    return folder


def check(folder: Path) -> int:
    """Print what the start can do; 1 if it is not fit to start from."""
    found: Mapping[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["evaluation_after"]
    accuracy, tested = found["evaluation/accuracy"], found.get("evaluation/accuracy_verified", 0.0)
    fit = ACCURACY[0] <= accuracy <= ACCURACY[1] and tested >= ACCURACY_TESTED
    print(
        f"{folder}: held-out accuracy {accuracy:.3f}, response length {found['evaluation/length_mean']:.1f}, tested "
        f"before answering {found['evaluation/verified']:.3f}, accuracy of those {tested:.3f}"
        + ("" if fit else f": NOT FIT (accuracy {ACCURACY}, of tested answers at least {ACCURACY_TESTED}); other seeds")
    )
    return 0 if fit else 1


if __name__ == "__main__":
    sys.exit(main())

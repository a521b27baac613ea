"""What the drill trains: the built-in puzzle's small model, two ranks, a checkpoint after each step; and how a run that
was disturbed is compared with one that was not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from asd_megatron.checkpoint import lineage
from asd_megatron.checks.drill.program import Ended, Program
from asd_megatron.checks.ranks import CheckError
from asd_megatron.observe.writer import read_metrics
from asd_megatron.run.folder import CHECKPOINTS

Sections = Mapping[str, Mapping[str, Any]]
"""Keys of a recipe."""
STEPS = 5
TWO_RANKS: dict[str, dict[str, int]] = {"tp2": {"tensor": 2}, "dp2": {"data": 2}}
UNEQUAL = ("time_utc", "time/", "perf/", "tokens/per_second", "checkpoint/", "files/")
"""Metrics that two runs need not share although they learn the same: of the clock and of the disk."""
RESPONSE_TOKENS = "tokens/response"


@dataclass(frozen=True)
class World:
    """A folder for the drill's recipes, runs and logs."""

    folder: Path

    def recipe(self, name: str, layout: str = "tp2", sections: Sections | None = None) -> Path:
        """The recipe of the run `name`, with the keys given put into its sections."""
        content: dict[str, dict[str, Any]] = {
            "run": {"name": name, "folder": str(self.folder / "runs" / "{name}"), "steps": STEPS, "seed": 1},
            "model": {"path": "puzzle:warm_start"},
            "parallelism": dict(TWO_RANKS[layout]),
            "algorithm": {"name": "antisd"},
            "gate": {"warmup_steps": 1},
            "sampling": {
                "problems_per_step": 2,
                "rollouts_per_problem": 4,
                "max_prompt_tokens": 64,
                "max_response_tokens": 32,
            },
            "data": {"train": "puzzle:train"},
            "reward": {"name": "puzzle"},
            "optimizer": {"learning_rate": 1e-4},
            "checkpoint": {"every": 1, "keep": 3, "export_at_end": False},
            "logging": {"progress": False, "tensorboard": False, "curves": False},
        }
        for section, keys in (sections or {}).items():
            content[section] = {**content.get(section, {}), **keys}
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    def run_folder(self, name: str) -> Path:
        return self.folder / "runs" / name

    def undisturbed(self, layout: str) -> Path:
        """The folder of a run without faults; made once."""
        name = f"undisturbed_{layout}"
        if not (self.run_folder(name) / "summary.json").is_file():
            self.complete(self.recipe(name, layout))
        return self.run_folder(name)

    def complete(self, recipe: Path, *overrides: str) -> Ended:
        """Run the recipe to its end without a fault. Raises CheckError when it does not get there."""
        with Program([str(recipe), *overrides], recipe.with_suffix(".again.log")) as program:
            ended = program.ended()
        if ended.status:
            raise CheckError(f"the run ended with status {ended.status} when it was started again: {ended.tail}")
        return ended


def newest(run: Path) -> int:
    """The step of the newest complete checkpoint; 0: none."""
    return lineage.latest_step(run / CHECKPOINTS)


def tokens(run: Path) -> dict[int, int]:
    """Response tokens of each step in a run's metrics."""
    if not (run / "metrics.jsonl").exists():
        return {}
    return {row["step"]: int(row[RESPONSE_TOKENS]) for row in read_metrics(run)}


def weights_equal(run: Path, reference: Path) -> bool:
    """Whether both runs end with the same weights, moments and metrics, bit for bit."""
    return newest(run) == newest(reference) and shards(run) == shards(reference) and metrics(run) == metrics(reference)


def shards(run: Path) -> dict[str, bytes]:
    """The files with weights and moments of a run's newest checkpoint."""
    checkpoint = run / CHECKPOINTS / lineage.name(newest(run))
    return {path.name: path.read_bytes() for path in sorted(checkpoint.glob("*.distcp"))}


def losses_close(run: Path, reference: Path, tolerance: float = 1e-5) -> bool:
    """Whether the losses of all steps agree, to a share of the largest."""
    ours, theirs = ([row["loss/policy"] for row in metrics(path)] for path in (run, reference))
    size = max(abs(loss) for loss in theirs)
    return len(ours) == len(theirs) and all(abs(a - b) <= tolerance * size for a, b in zip(ours, theirs, strict=True))


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without those of `UNEQUAL`."""
    return [{k: v for k, v in row.items() if not k.startswith(UNEQUAL)} for row in read_metrics(run)]

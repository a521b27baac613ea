"""Small studies, and cells that only pretend to train."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from asd_megatron.study.cells import CellRecord
from asd_megatron.study.plan import Cell, CellKey, cell_keys
from asd_megatron.study.report import Findings
from asd_megatron.study.results import CellResult, points, training_seconds
from asd_megatron.study.schema import make_study

# Writes the metrics of a run that gets better, unless its third argument says otherwise.
PROGRAM = """
import json, os, pathlib, sys, time
folder, steps, outcome = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
folder.mkdir(parents=True, exist_ok=True)
(folder / "recipe.yaml").write_text("")
print("threads", os.environ["OMP_NUM_THREADS"], flush=True)
if outcome == "sleep":
    (folder / "asleep").touch()
    time.sleep(60)
if outcome == "stop":
    events = [{"event": "fresh"}, {"event": "stop", "step": 1}]
    (folder / "history.jsonl").write_text("".join(json.dumps(event) + "\\n" for event in events))
if outcome == "fail":
    print("ValueError: the corpus is empty", flush=True)
    sys.exit(3)
rows = [{"step": 0, "evaluation/accuracy": 0.2}]
rows += [{"step": s, "time/total": 1.0, "evaluation/accuracy": 0.2 + 0.1 * s} for s in range(1, steps + 1)]
(folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
"""


def write_recipe(folder: Path) -> Path:
    """A recipe whose model folder is there, as far as a look from outside can tell."""
    model = folder / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text("{}")
    path = folder / "recipe.yaml"
    path.write_text(f"model: {{path: {model}}}\ndata: {{train: t}}\nreward: {{name: exact}}\nrun: {{steps: 2}}\n")
    return path


def study_values(folder: Path, **changed: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "name": "small",
        "folder": f"{folder}/studies/{{name}}",
        "recipe": str(write_recipe(folder)),
        "arms": {"grpo": {"overrides": {"algorithm.name": "grpo"}}, "antisd": {}},
        "seeds": [1],
    }
    return values | changed


def write_study(folder: Path, **changed: Any) -> Path:
    path = folder / "study.yaml"
    path.write_text(json.dumps(study_values(folder, **changed)))  # JSON is YAML
    return path


def pretend(cell: Cell) -> list[str]:
    """A command for `Runner`: the cell's learning rate says what becomes of it."""
    fates = {1.0: "fail", 2.0: "sleep", 3.0: "stop"}
    outcome = fates.get(cell.recipe.optimizer.learning_rate, "finish")
    return [sys.executable, "-c", PROGRAM, str(cell.run_folder), str(cell.recipe.run.steps), outcome]


FAILS: Mapping[str, Any] = {"optimizer.learning_rate": 1.0}
SLEEPS: Mapping[str, Any] = {"optimizer.learning_rate": 2.0}
STOPS: Mapping[str, Any] = {"optimizer.learning_rate": 3.0}


def record(key: CellKey, **changed: Any) -> CellRecord:
    values: dict[str, Any] = {
        "arm": key.arm,
        "start": key.start,
        "seed": key.seed,
        "status": "finished",
        "recipe_hash": "",
        "overrides": {},
        "recipe": {},
        "command": [],
        "version": "0",
        "threads": 1,
        "parallel": 1,
        "started": "2026-01-01T00:00:00+00:00",
        "seconds": 60.0,
        "cpu_seconds": 50.0,
        "exit_status": 0,
    }
    return CellRecord(**values | changed)


def result(key: CellKey, accuracies: Sequence[float], seconds_a_step: float = 2.0, every: int = 10) -> CellResult:
    """A cell with an evaluation every `every` steps."""
    rows: list[dict[str, Any]] = []
    for step in range(every * (len(accuracies) - 1) + 1):
        row: dict[str, Any] = {"step": step}
        if step:
            row |= {"time/total": seconds_a_step, "pmi/mean": math.sin(step) if step % 2 else None}
        if step % every == 0:
            row["evaluation/accuracy"] = accuracies[step // every]
            if step:
                row |= {"time/total": seconds_a_step + 5.0, "time/evaluate": 5.0}
        rows.append(row)
    return CellResult(key, points(rows), rows, training_seconds(rows))


def findings(folder: Path) -> Findings:
    """Two arms from two starts with three seeds: grpo learns, antisd does sooner, by a margin that depends on both."""
    study = make_study(
        study_values(
            folder,
            starts={"a": {}, "b": {}},
            seeds=[1, 2, 3],
            target={"at_least": 0.5},
            table={"metrics": ["evaluation/accuracy", "pmi/mean"]},
            plot=["evaluation/accuracy", "pmi/mean", "gate/lambda"],
        )
    )
    keys = cell_keys(study)
    results = []
    for key in keys:
        base = 0.2 + 0.01 * key.seed + (0.1 if key.start == "b" else 0.0)
        gain = 0.2 if key.arm == "grpo" else 0.3 + 0.02 * key.seed
        results.append(result(key, [base, base + gain, base + 2 * gain], 2.0 if key.arm == "grpo" else 2.5))
    return Findings(study, {key: record(key) for key in keys}, results)

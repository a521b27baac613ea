"""Runs on the stand-in for Transformer Engine: one that turns to FP8 and back, one whose moments turn to bfloat16."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

from tests.e2e.world import World, make_world
from tests.te_double import run_ranks_with_te

SIZES = {"layers": 4, "hidden_size": 32, "intermediate_size": 64, "head_dim": 16}
FORMATS: list[dict[str, Any]] = [
    {},
    {"fp8": "blockwise", "fp8_scores": True, "fp8_probe_every": 1},
    {"fp8": "blockwise", "fp8_probe_every": 2},
]


Told = tuple[str, list[dict[str, Any]], list[Any]]
"""A run's console, metrics and history."""


def _runs(rank: int, folder: str) -> tuple[list[Told], list[list[dict[str, Any]]]]:
    """Two steps in each of `FORMATS`, one run, after each of them; the metrics of `_moments`."""
    from asd_megatron.distributed import device

    device.prepare()
    from asd_megatron.observe.writer import read_metrics
    from asd_megatron.run.history import read_history

    world, found = make_world(Path(folder), **SIZES), []
    for number, precision in enumerate(FORMATS):
        console = io.StringIO()
        with contextlib.redirect_stdout(console), contextlib.redirect_stderr(console):
            run = world.train(
                "run",
                run={"steps": 2 * (number + 1)},
                algorithm={"name": "antisd", "updates_per_batch": 2},
                gate={"warmup_steps": 1},
                model={"path": str(world.model), "layers": "te"},
                precision=precision,
                checkpoint={"every": 1, "export_at_end": False},
            )
        found.append((console.getvalue(), read_metrics(run), read_history(run)))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return found, [read_metrics(run) for run in _moments(world)]


def _moments(world: World) -> list[Path]:
    """A run with moments in float32, and one that resumes with moments in bfloat16 after its first step."""
    runs = []
    for name in ("float32", "bfloat16"):
        for steps, moments in ((1, "float32"), (3, name)):
            run = world.train(
                name,
                run={"steps": steps},
                model={"path": str(world.model), "layers": "te", "dtype": "bfloat16"},
                parallelism={"distributed_optimizer": True},
                optimizer={"learning_rate": 1e-2, "beta2": 0.95, "moments": moments},
                checkpoint={"every": 1, "export_at_end": False},
            )
        runs.append(run)
    return runs


def test_a_run_turns_to_fp8_and_back(tmp_path: Path) -> None:
    """H_warm moves with the teacher's median entropy, by what the probe of the same step found, and back."""
    ((found, moments),) = run_ranks_with_te(_runs, 1, str(tmp_path), init=False)
    check_moments(*moments)
    (_, first, _), (into, second, _), (back, third, history) = found
    warm = [rows[-1]["gate/h_warm"] for rows in (first, second, third)]
    shifts = [1 + rows[step]["fp8/entropy_shift"] for rows, step in ((second, 2), (third, 4))]
    assert abs(warm[1] / warm[0] - shifts[0]) < 1e-6 and shifts[0] != 1
    assert abs(warm[2] / warm[1] - 1 / shifts[1]) < 1e-6
    assert not any(row["gate/warming_up"] for row in third[1:])
    for said in (into, back):
        assert "precision.fp8_scores" in said and said.count("gate.h_warm is ") == 1

    assert "fp8/student_drift" not in first[-1] and {"fp8/pmi_drift", "time/probe"} <= set(third[3])
    assert "fp8/pmi_drift" in third[5] and "fp8/update_drift" not in third[3]  # scores in FP8 are the update's
    assert third[4]["fp8/update_drift"] > 1e-4 and third[4]["loss/clip_fraction"] < 0.2
    recorded = [entry["key"] for entry in history if entry["event"] == "change"]
    assert recorded.count("precision.fp8_scores") == 2 and recorded.count("precision.fp8") == 1
    # In the start-up report: the format and what a step costs.
    assert "blockwise scaling" in into and "an assumption" in back


def check_moments(expected: list[dict[str, Any]], found: list[dict[str, Any]]) -> None:
    """The second step's rollouts and gradients are those of the same weights; its update has rounded moments."""
    norms = [[row["optimizer/grad_norm"] for row in rows if row["step"] > 0] for rows in (expected, found)]
    assert norms[0][:2] == norms[1][:2] and norms[0][2] != norms[1][2]

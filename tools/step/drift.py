"""How far bfloat16 working weights move log-probs and u on rollouts that float32 weights made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from step.conditions import overrides

from asd_megatron.config import load_recipe
from asd_megatron.observe.dumps import Dump, dump_path, read_dump
from asd_megatron.run.rl import TrainingRun
from asd_megatron.run.session import open_session
from asd_megatron.train import train

NAMES = {"s": "student_logprobs", "t": "teacher_logprobs", "u": "pmi"}


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """`spec`: recipe, overrides, folder. One step in float32 with its rollouts dumped, then that step replayed in
    bfloat16. Of s, t and u over all tokens: the mean absolute value, and of bfloat16's difference the mean absolute
    value, its 99% quantile, and the mean."""
    folder = Path(spec["folder"])
    recorded = _step(spec, folder / "float32", ["--model.dtype", "float32"])
    replay = ["--model.dtype", "bfloat16", "--rollout.engine", "replay"]
    replayed = _step(spec, folder / "bfloat16", [*replay, "--rollout.replay_folder", str(folder / "float32")])
    keys = [(e.rollout.prompt_id, e.rollout.sample) for e in recorded.examples]
    if keys != [(e.rollout.prompt_id, e.rollout.sample) for e in replayed.examples]:
        raise RuntimeError("the replayed rollouts are not in the recorded order")
    found = {}
    for name, column in NAMES.items():
        moved = replayed.table[column] - recorded.table[column]
        moved = moved[moved.isfinite()].double()
        found[name] = {
            "mean_abs": float(recorded.table[column].nan_to_num().abs().double().mean()),
            "mean_abs_drift": float(moved.abs().mean()),
            "q99_abs_drift": float(torch.quantile(moved.abs(), 0.99)),
            "mean_drift": float(moved.mean()),
        }
    return found


def _step(spec: dict[str, Any], folder: Path, extra: list[str]) -> Dump:
    given = [*spec["overrides"], "--run.dump_rollouts", "true", "--logging.tensorboard", "false", *extra]
    recipe = load_recipe(spec["recipe"], overrides(folder, 1, given))
    with open_session(recipe) as session:
        train(TrainingRun(recipe, session))
    return read_dump(dump_path(folder, 1))


CELLS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"drift": measure}

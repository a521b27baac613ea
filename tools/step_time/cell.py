"""One rank of a measurement: `python -m step_time.cell FOLDER SPEC OUT`, on several ranks under torchrun.

Runs the trainer's teacher pass and update on random weights and ids, and in the same process what the planner says of
them, after it has measured the rates of this machine on as many ranks.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from step_time.models import VOCABULARY

from asd_megatron.antisd import Gate
from asd_megatron.checks.layouts import ParityCell
from asd_megatron.checks.parity_worker import Trained, build, run_step
from asd_megatron.distributed import device
from asd_megatron.distributed import layout as layouts
from asd_megatron.distributed.layout import Layout
from asd_megatron.files import write_json
from asd_megatron.models.gpt import Recompute
from asd_megatron.planner import lengths
from asd_megatron.planner.calibration import Clock, calibrate
from asd_megatron.planner.hardware import Accelerator
from asd_megatron.planner.loads import Batch
from asd_megatron.planner.setting import Lengths, Serving, Setting, Training, Workload
from asd_megatron.planner.step_time import training_phases
from asd_megatron.records import DemonstrationSource, Example, FinishReason, Rollout
from asd_megatron.trainer import passes

PROMPT, PRIVILEGED = 32, 64
WORK = Workload(
    problems=4,
    samples=4,
    prompt=PROMPT,
    responses=Lengths(median=120, most=400, spread=0.6),
    privileged=PRIVILEGED,
    checkpoint_every=0,
)
REPEATS = 3


def examples() -> list[Example]:
    """A batch whose responses have exactly the planner's lengths."""
    rng = np.random.default_rng(0)

    def ids(n: int) -> Any:
        return rng.integers(2, VOCABULARY, n, dtype=np.int32)

    found = []
    for number, length in enumerate(lengths.quantiles(WORK.responses, WORK.rollouts)):
        rollout = Rollout(
            prompt_id=str(number),
            sample=0,
            prompt_ids=ids(PROMPT),
            response_ids=ids(length),
            logprobs=np.zeros(length, dtype=np.float32),
            finish_reason=FinishReason.STOP,
            weight_version=0,
            loss_mask=np.ones(length, dtype=bool),
        )
        found.append(
            Example(
                rollout=rollout,
                reward=float(number % 2),
                group_advantage=1.0 if number % 2 else -1.0,
                teacher_prompt_ids=ids(PROMPT + PRIVILEGED),
                demonstration_source=DemonstrationSource.REFERENCE,
            )
        )
    return found


def measure(trained: Trained, clock: Clock) -> dict[str, float]:
    """Seconds of one step, of the rank that takes longest: the teacher's pass, and the update with its optimizer
    step."""
    marks = []
    score = passes.score_teacher

    def mark() -> None:
        dist.barrier()
        marks.append(clock())

    def timed(*args: Any, **kwargs: Any) -> Any:
        mark()
        result = score(*args, **kwargs)
        mark()
        return result

    passes.score_teacher = timed
    try:
        run_step(trained, examples(), Gate(0.5, warmup_steps=0, h_warm=1e-3), name="antisd")
    finally:
        passes.score_teacher = score
    mark()
    spent = torch.tensor([marks[1] - marks[0], marks[2] - marks[1]], dtype=torch.float64)
    dist.all_reduce(spent, dist.ReduceOp.MAX)
    return dict(zip(("teacher", "update"), spent.tolist(), strict=True))


def predict(trained: Trained, cell: ParityCell, gpu: Accelerator, *, waiting: bool) -> dict[str, float]:
    """The planner's seconds of the same phases; without `waiting` those that a rank works."""
    training = Training(
        layout=cell.layout,
        dtype="float32",
        layers="local",
        recompute=Recompute(cell.recompute),
        pack=cell.tokens_per_microbatch,
        distributed_optimizer=cell.distributed_optimizer,
    )
    setting = Setting(trained.port.shape, training, Serving(engine="embedded"), WORK, gpu)
    phases = training_phases(setting, Batch(setting.shape, WORK))
    found = {phase.name: phase.seconds - (0.0 if waiting else phase.cost.idle) for phase in phases}
    return {"teacher": found["teacher"], "update": found["update"] + found["optimizer"]}


def least(times: list[dict[str, float]]) -> dict[str, float]:
    """Of each phase: others on the machine only add to it."""
    return {name: min(spent[name] for spent in times) for name in times[0]}


def main(folder: str, spec: str, out: str) -> None:
    wanted = json.loads(spec)
    torch.set_num_threads(1)
    device.prepare()
    cell = ParityCell(
        name="cell",
        layout=Layout(**wanted["layout"]),
        model=wanted["model"],
        recompute=wanted.get("recompute", "none"),
        tokens_per_microbatch=wanted["pack"],
        distributed_optimizer=wanted["layout"].get("data", 1) > 1,
    )
    trained = build(Path(folder), cell)
    world = trained.process_groups.world
    wall = wanted["clock"] == "wall"
    clock = time.perf_counter if wall else time.process_time
    measure(trained, clock)  # allocates, and plans what later steps reuse
    accelerators, times = [], []
    for _ in range(REPEATS):
        accelerators.append(calibrate("float32", world, clock))
        times.append(measure(trained, clock))
    fastest = max(accelerators, key=lambda gpu: gpu.float32)
    predicted = least([predict(trained, cell, gpu, waiting=wall) for gpu in accelerators])
    if dist.get_rank() == 0:
        rates = {
            "gflops": fastest.float32 / 1e9,
            "attention_gflops": fastest.float32 * fastest.efficiency.attention / 1e9,
            "memory_gbs": fastest.memory_rate / 1e9,
            "link_gbs": fastest.node_link / 1e9,
        }
        write_json(out, {"measured": least(times), "predicted": predicted, "rates": rates})
    layouts.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Whole steps of several conditions in one process, in turn, on the same prompts, samples and weights.

All conditions train one model through one optimizer. The learning rate is so small that no weight changes, and sampling
noise is a function of seed, step, problem and sample: at every step all conditions sample the same responses. Nothing
is shared between them: each samples, rewards, scores, updates and writes its metrics for itself, as `train` does.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from step.figures import padding_share

from asd_megatron.config import Recipe, load_recipe
from asd_megatron.models.attention_plan import plan_buckets
from asd_megatron.observe.writer import RunWriter, read_metrics
from asd_megatron.records import PackedTokens
from asd_megatron.run.rl import Batch, TrainingRun
from asd_megatron.run.session import Session, open_session
from asd_megatron.trainer.batch import Pack
from asd_megatron.trainer.scorer import score

FROZEN = 1e-30  # a learning rate that no float32 or bfloat16 weight notices


def overrides(folder: Path, steps: int, extra: Sequence[str]) -> list[str]:
    """Of a recipe that is measured: nothing but steps, everything in `folder`."""
    fixed = {
        "run.folder": str(folder),
        "run.overwrite": "true",
        "run.steps": str(steps),
        "run.dump_rollouts": "false",
        "evaluation.every": "0",
        "evaluation.at_start": "false",
        "evaluation.at_end": "false",
        "checkpoint.every": "0",
        "checkpoint.export_at_end": "false",
        "logging.progress": "false",
        "optimizer.learning_rate": str(FROZEN),
        "optimizer.min_learning_rate": "0",
    }
    return [*(part for key, value in fixed.items() for part in (f"--{key}", value)), *extra]


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """`spec`: recipe, overrides, conditions, steps, warm (first steps that do not count), folder. A condition is an
    `algorithm.name`, or NAME-ESTIMATOR with an `algorithm.estimator`. Collective; the result is global rank 0's.
    `processor`: this rank's processor time, which others disturb less than `seconds`."""
    folder, steps, warm = Path(spec["folder"]), spec["steps"] + spec["warm"], spec["warm"]
    recipes: dict[str, Recipe] = {
        name: load_recipe(
            spec["recipe"],
            [*overrides(folder / "run", steps, spec["overrides"]), *_condition(name)],
        )
        for name in spec["conditions"]
    }
    first = next(iter(recipes.values()))
    with open_session(first) as session:
        session.begin()
        runs = {name: TrainingRun(recipe, session) for name, recipe in recipes.items()}
        writers = {name: RunWriter(folder / name) for name in runs} if session.is_root else {}
        passes = _Passes(session)
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        processor: dict[str, list[float]] = {name: [] for name in runs}
        extras: dict[str, list[dict[str, Any]]] = {name: [] for name in runs}
        for step in range(1, steps + 1):
            order = list(runs) if step % 2 else list(reversed(runs))
            for name in order:
                session.files.writer = writers.get(name)
                with passes.counting() as counted:
                    before = time.process_time()
                    spent, batch = _whole_step(runs[name], session, step)
                    processor[name].append(time.process_time() - before)
                seconds[name].append(spent)
                extras[name].append({**counted, **_extras(runs[name], session, batch)})
        if session.is_root:
            for writer in writers.values():
                writer.close()
        plans = {name: run.plan.forwards_per_step for name, run in runs.items()}
        rows = {name: read_metrics(folder / name)[warm:] for name in runs} if session.is_root else {}
    return {
        "plan": plans,
        "seconds": {name: values[warm:] for name, values in seconds.items()},
        "processor": {name: values[warm:] for name, values in processor.items()},
        "extras": {name: values[warm:] for name, values in extras.items()},
        "metrics": rows,
    }


def _condition(name: str) -> list[str]:
    algorithm, _, estimator = name.partition("-")
    return ["--algorithm.name", algorithm, *(["--algorithm.estimator", estimator] if estimator else [])]


def _whole_step(run: TrainingRun, session: Session, step: int) -> tuple[float, Batch]:
    """One turn of the loop in `train`; seconds until all ranks are done."""
    dist.barrier()
    run.clock.take()
    started = _now()
    groups = run.collect(step)
    batch = run.build_batch(groups, step)
    teacher = run.score_teacher(batch)
    student = run.score_student(batch)
    reference = run.score_reference(batch)
    lam = run.gate_step(batch, teacher, student)
    stats = run.update(batch, teacher, student, lam, reference)
    run.observe(step, batch, teacher, stats, reference)
    run.checkpoint_if_due(step)
    dist.barrier()
    return _now() - started, batch


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class _Passes:
    """Counts the tokens that go through this rank's chunks in scoring (no gradient) and training passes."""

    def __init__(self, session: Session) -> None:
        self._counts = {"scored": 0, "trained": 0}
        port = session.port
        first, forward = port.chunks[0], port.forward  # of several virtual stages, each sees every token

        def counted(chunk: torch.nn.Module, packed: PackedTokens) -> torch.Tensor:
            if chunk is first:
                self._counts["trained" if torch.is_grad_enabled() else "scored"] += packed.input_ids.numel()
            return forward(chunk, packed)

        port.forward = counted  # type: ignore[method-assign]

    @contextmanager
    def counting(self) -> Iterator[dict[str, int]]:
        """The counts of what happens inside; complete on leaving."""
        self._counts.update(scored=0, trained=0)
        found: dict[str, int] = {}
        yield found
        found.update(self._counts)


def _extras(run: TrainingRun, session: Session, batch: Batch) -> dict[str, Any]:
    """What the step does not say: a student scoring forward of its batch, and the padding of its packs."""
    student = batch.local.student_packs()
    teacher = batch.local.teacher_packs() if run.plan.teacher_scoring else []
    dist.barrier()
    started = _now()
    temperature = run.recipe.sampling.temperature
    score(session.port, session.process_groups, student, batch.local.table.tokens, temperature=temperature)
    dist.barrier()
    return {
        "student_forward": _now() - started,
        "batch": sum(len(p.tokens.input_ids) for p in student),
        "student": _padding(student),
        "teacher": _padding(teacher),
    }


def _padding(packs: Sequence[Pack]) -> dict[str, float]:
    """Tokens and query-key pairs of packs, with and without padding; `sequences`: tokens if no prefix were shared."""
    total = sum(int(p.tokens.cu_seqlens[-1]) for p in packs)
    real = sum(p.real_tokens for p in packs)
    pairs = used = 0
    for pack in packs:
        cu, parents = pack.tokens.cu_seqlens.tolist(), pack.tokens.parents
        for bucket in plan_buckets(cu, parents, torch.device("cpu")):
            pairs += bucket.queries.numel() * bucket.keys.shape[1]
        used += _pairs(cu, parents)
    return {
        "tokens": total,
        "real": real,
        "sequences": sum(p.sequence_tokens for p in packs),
        "padding_share": padding_share(total, real),
        "attention_padding_share": padding_share(pairs, used),
    }


def _pairs(cu: Sequence[int], parents: Sequence[int]) -> int:
    """Query-key pairs of a pack's stretches, each queries x (the keys before it, its own), the causal half included."""
    before: list[int] = []
    total = 0
    for i, (start, end) in enumerate(itertools.pairwise(cu)):
        parent = parents[i] if parents else -1
        depth = before[parent] + cu[parent + 1] - cu[parent] if parent >= 0 else 0
        before.append(depth)
        total += (end - start) * (depth + end - start)
    return total


CELLS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"conditions": measure}

"""The sections of the benchmark: cases, each with its measurements and what came out."""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from step import launch
from step.figures import Figure, forwards, padding_share, paired_ratio, phases, summary

from asd_megatron.errors import UserError

PUZZLE, SMOLLM2 = "examples/puzzle/quickstart.yaml", "examples/smollm2/word_problems.yaml"
RECIPES = {"puzzle": PUZZLE, "smollm2": SMOLLM2}
ONE_RANK = ("--parallelism.tensor", "1", "--parallelism.pipeline", "1", "--parallelism.data", "null")
FP32, BF16 = ("--model.dtype", "float32"), ("--model.dtype", "bfloat16")
SMALL_PACKS = ("--batching.tokens_per_microbatch", "2048")  # float32 activations of SmolLM2 in a few GB
ONE_DEMONSTRATION = ("--privileged.demonstrations_per_group", "1")
NO_ENDS = ("--sampling.stop_token_ids", "[]", "--sampling.stop", "[]")
TRL_DRIVER = Path(__file__).resolve().parents[1] / "trl_env" / "grpo_step.py"
EXACT = "antisd-full_vocabulary"
PATIENCE = 900.0  # seconds that one measurement may take


@dataclass
class Context:
    """What cases need beside the machine. `quick`: few repetitions, to see that all works. `say` tells progress;
    `details` and `phases` go into the JSON file."""

    quick: bool
    threads: int
    trl_python: Path
    say: Callable[[str], None]
    details: dict[str, Any] = field(default_factory=dict)
    phases: dict[str, dict[str, float]] = field(default_factory=dict)

    def cell(self, label: str, kind: str, model: str, overrides: Sequence[str], ranks: int = 1, **spec: Any) -> Any:
        self.say(label)
        given = {"recipe": RECIPES[model], "overrides": list(overrides), **spec}
        return launch.run_cell(kind, given, ranks=ranks, threads=self.threads, timeout=PATIENCE)

    def count(self, quick: int, full: int) -> int:
        return quick if self.quick else full

    def keep_phases(self, name: str, condition: str, found: dict[str, Any]) -> None:
        self.phases[name] = phases(found["metrics"][condition], found["seconds"][condition])


@dataclass(frozen=True)
class Case:
    name: str
    model: str
    run: Callable[[], list[Figure]]


def options(**keys: Any) -> list[str]:
    """Overrides of a recipe, `__` for the dot."""
    return [part for key, value in keys.items() for part in (f"--{key.replace('__', '.')}", json.dumps(value))]


# ---------------------------------------------------------------- passes, phases, AntiSD over GRPO, padding


def conditions(context: Context) -> list[Case]:
    """AntiSD beside GRPO, whole steps in turn in one process."""
    puzzle = partial(_conditions, context, "puzzle", warm=3, steps=context.count(6, 40))
    trained = partial(_trained_puzzle, context, puzzle, steps=75)
    smollm2 = partial(_conditions, context, "smollm2", warm=1)
    few = partial(smollm2, steps=context.count(1, 3))
    return [
        Case("puzzle", "puzzle", partial(puzzle, "puzzle", ONE_RANK)),
        Case("puzzle_shared", "puzzle", partial(puzzle, "puzzle_shared", (*ONE_RANK, *ONE_DEMONSTRATION))),
        Case("puzzle_trained", "puzzle", partial(trained, "puzzle_trained", ONE_RANK)),
        Case("puzzle_tp2", "puzzle", partial(puzzle, "puzzle_tp2", (), ranks=2)),
        Case("smollm2_bf16", "smollm2", partial(few, "smollm2_bf16", (*ONE_RANK, *BF16))),
        Case(
            "smollm2_bf16_shared",
            "smollm2",
            partial(few, "smollm2_bf16_shared", (*ONE_RANK, *BF16, *ONE_DEMONSTRATION)),
        ),
        Case(
            "smollm2_fp32",
            "smollm2",
            partial(smollm2, "smollm2_fp32", (*ONE_RANK, *FP32, *SMALL_PACKS), steps=context.count(1, 2)),
        ),
    ]


def _conditions(
    context: Context, model: str, name: str, overrides: Sequence[str], *, steps: int, warm: int, ranks: int = 1
) -> list[Figure]:
    both = ["grpo", "antisd"]
    found = _in_turn(context, model, name, overrides, ranks, what="GRPO and AntiSD", both=both, steps=steps, warm=warm)
    return condition_figures(name, found)


def _in_turn(
    context: Context,
    model: str,
    name: str,
    overrides: Sequence[str],
    ranks: int = 1,
    *,
    what: str,
    both: Sequence[str],
    steps: int,
    warm: int,
) -> dict[str, Any]:
    """What a `conditions` cell found of `both`, its details and phases kept. `what`: the two in words."""
    label = f"{name}: {what} in turn, {steps} steps each"
    found: dict[str, Any] = context.cell(
        label, "conditions", model, overrides, ranks, conditions=both, steps=steps, warm=warm
    )
    kept = {condition: summary(seconds) for condition, seconds in found["seconds"].items()}
    for condition, rows in found["metrics"].items():
        context.keep_phases(f"{name} {condition}", condition, found)
        kept[condition]["response_tokens"] = statistics.mean(row["response/length_mean"] for row in rows)
    context.details[name] = kept
    return found


def _trained_puzzle(
    context: Context, measure: Callable[..., list[Figure]], name: str, overrides: Sequence[str], *, steps: int
) -> list[Figure]:
    """On the model after half of its recipe: responses are three times as long as the warm start's."""
    with tempfile.TemporaryDirectory(prefix="puzzle-") as folder:
        run = Path(folder) / "run"
        given = options(run__folder=str(run), run__steps=steps, evaluation__every=0, evaluation__at_start=False)
        given += options(evaluation__at_end=False, checkpoint__export_at_end=True, logging__progress=False)
        context.say(f"{name}: {steps} steps of the recipe first")
        command = [sys.executable, "-m", "asd_megatron.train", PUZZLE, *overrides, *given]
        launch.run(command, threads=context.threads, timeout=PATIENCE)
        model = options(model__path=str(run / "hf" / f"step_{steps:06d}"))
        return measure(name, [*overrides, *model])


def estimators(context: Context) -> list[Case]:
    """AntiSD with the exact divergence beside the sampled term, whole steps in turn in one process."""
    both = ["antisd", EXACT]

    def measure(name: str, model: str, overrides: Sequence[str], *, steps: int, warm: int) -> list[Figure]:
        turns = {"what": "both estimators", "both": both, "steps": steps, "warm": warm}
        found = _in_turn(context, model, name, overrides, **turns)
        updates = ([row["time/update"] for row in found["metrics"][condition]] for condition in (EXACT, "antisd"))
        return [
            Figure(
                f"{name}.exact_over_sampled",
                paired_ratio(found["seconds"][EXACT], found["seconds"]["antisd"]),
                target=1.25,
            ),
            Figure(
                f"{name}.exact_over_sampled_processor",
                paired_ratio(found["processor"][EXACT], found["processor"]["antisd"]),
            ),
            Figure(f"{name}.exact_over_sampled_update", paired_ratio(*updates)),
        ]

    puzzle = partial(measure, "estimators_puzzle", "puzzle", ONE_RANK, steps=context.count(4, 40), warm=3)
    few = {"steps": context.count(1, 3), "warm": 1}
    smollm2 = partial(measure, "estimators_smollm2_bf16", "smollm2", (*ONE_RANK, *BF16), **few)
    return [Case("puzzle", "puzzle", puzzle), Case("smollm2_bf16", "smollm2", smollm2)]


def condition_figures(name: str, found: dict[str, Any]) -> list[Figure]:
    """Of a `conditions` cell with GRPO and AntiSD."""
    seconds, extras = found["seconds"], found["extras"]
    figures = []
    for condition in ("grpo", "antisd"):
        steps, rows = extras[condition], found["metrics"][condition]
        tokens = statistics.median(forwards(s["scored"], s["trained"], s["batch"]) for s in steps)
        trained = [r.get("time/teacher", 0.0) + r.get("time/student", 0.0) + r["time/update"] for r in rows]
        figures += [
            Figure(f"{name}.{condition}.forwards_planned", found["plan"][condition]),
            Figure(f"{name}.{condition}.forwards_in_tokens", tokens),
            Figure(
                f"{name}.{condition}.forwards_in_time", paired_ratio(trained, [s["student_forward"] for s in steps])
            ),
            Figure(f"{name}.{condition}.step", statistics.median(seconds[condition]), "s"),
        ]
    ratio = paired_ratio(seconds["antisd"], seconds["grpo"])
    busy = paired_ratio(found["processor"]["antisd"], found["processor"]["grpo"])
    figures += [
        Figure(f"{name}.antisd_over_grpo", ratio, target=1.25, bound="most"),
        Figure(f"{name}.antisd_over_grpo_processor", busy),
    ]
    longer = statistics.mean(s["teacher"]["tokens"] / s["batch"] for s in extras["antisd"])
    figures.append(Figure(f"{name}.teacher_tokens_over_student", longer))
    for who in ("student", "teacher"):
        packs = [s[who] for s in extras["antisd"]]
        total, real = sum(p["tokens"] for p in packs), sum(p["real"] for p in packs)
        shared = padding_share(sum(p["sequences"] for p in packs), real)
        inside = statistics.mean(p["attention_padding_share"] for p in packs)
        figures += [
            Figure(f"{name}.{who}.padding_share", padding_share(total, real), "%", 0.02, "most"),
            Figure(f"{name}.{who}.shared_share", shared, "%"),
            Figure(f"{name}.{who}.attention_pairs_padding_share", inside, "%"),
        ]
    return figures


# ---------------------------------------------------------------- sampling


def sampling(context: Context) -> list[Case]:
    """The embedded engine beside `generate`."""
    puzzle = partial(_sampling, context, "puzzle", new=64, rounds=context.count(3, 9))
    smollm2 = partial(_sampling, context, "smollm2", new=32, rounds=context.count(1, 3))
    return [
        Case("puzzle_512", "puzzle", partial(puzzle, "puzzle_512", FP32, 32, 16)),
        Case("puzzle_16", "puzzle", partial(puzzle, "puzzle_16", FP32, 4, 4)),
        Case("puzzle_16_with_ends", "puzzle", partial(puzzle, "puzzle_16_with_ends", FP32, 4, 4, ends=True)),
        Case("smollm2_64_fp32", "smollm2", partial(smollm2, "smollm2_64_fp32", FP32, 8, 8)),
        Case("smollm2_64_bf16", "smollm2", partial(smollm2, "smollm2_64_bf16", BF16, 8, 8)),
    ]


def _sampling(
    context: Context,
    model: str,
    name: str,
    dtype: Sequence[str],
    problems: int,
    samples: int,
    *,
    new: int,
    rounds: int,
    ends: bool = False,
) -> list[Figure]:
    label = f"{name}: embedded engine and generate in turn, {rounds} rounds"
    sizes = {"problems": problems, "samples": samples, "new_tokens": new, "rounds": rounds, "ends": ends}
    found = context.cell(label, "sampling", model, [*ONE_RANK, *dtype], **sizes)
    rates, busy = found["rates"], found["processor_rates"]
    context.details[f"sampling.{name}"] = {way: summary(values) for way, values in rates.items()}
    ratio = paired_ratio(rates["embedded"], rates["generate"])
    return [
        *(Figure(f"sampling.{name}.{way}", statistics.median(rates[way]), "tokens/s") for way in rates),
        Figure(f"sampling.{name}.over_generate", ratio, target=None if ends else 1.5, bound="least"),
        Figure(f"sampling.{name}.over_generate_processor", paired_ratio(busy["embedded"], busy["generate"])),
    ]


# ---------------------------------------------------------------- weak scaling


def scaling(context: Context) -> list[Case]:
    """Twice the problems on twice the data-parallel ranks, every response of the full length."""
    puzzle = partial(_scaling, context, "puzzle", 4, steps=context.count(6, 20), warm=3, turns=context.count(1, 2))
    smollm2 = partial(_scaling, context, "smollm2", 2, steps=context.count(1, 2), warm=1, turns=1)
    return [Case("puzzle", "puzzle", puzzle), Case("smollm2", "smollm2", smollm2)]


def _scaling(context: Context, model: str, problems: int, *, steps: int, warm: int, turns: int) -> list[Figure]:
    if (os.cpu_count() or 1) < 2:
        raise UserError("weak scaling needs two cores")
    medians: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(turns):
        for ranks, seconds in medians.items():
            label = f"{model}: {problems * ranks} problems on {ranks} rank(s)"
            overrides = [*ONE_RANK, *NO_ENDS, *options(sampling__problems_per_step=problems * ranks)]
            spec: dict[str, Any] = {"conditions": ["antisd"], "steps": steps, "warm": warm}
            found = context.cell(label, "conditions", model, overrides, ranks, **spec)
            seconds.append(statistics.median(found["seconds"]["antisd"]))
    context.details[f"scaling.{model}"] = medians
    return [
        *(Figure(f"scaling.{model}.ranks_{ranks}", statistics.median(s), "s") for ranks, s in medians.items()),
        Figure(f"scaling.{model}.efficiency", paired_ratio(medians[1], medians[2])),
    ]


# ---------------------------------------------------------------- TRL


def trl(context: Context) -> list[Case]:
    """Our GRPO step beside TRL's in float32, processes in turn; end tokens are forbidden there and end nothing here."""
    if not context.trl_python.is_file():
        raise UserError(
            f"there is no {context.trl_python}: tools/trl_env/create.sh makes it, or name one with --trl-python"
        )
    puzzle = partial(_trl, context, "puzzle", 4, 4, 64, steps=context.count(4, 15), warm=2)
    smollm2 = partial(_trl, context, "smollm2", 2, 8, 32, steps=1, warm=1)
    return [Case("puzzle", "puzzle", puzzle), Case("smollm2", "smollm2", smollm2)]


def _trl(context: Context, model: str, problems: int, samples: int, new: int, *, steps: int, warm: int) -> list[Figure]:
    sizes = options(
        sampling__problems_per_step=problems,
        sampling__rollouts_per_problem=samples,
        sampling__max_response_tokens=new,
    )
    overrides = [*ONE_RANK, *FP32, *NO_ENDS, *sizes]
    task = context.cell(f"{model}: prompts", "prompts", model, overrides, steps=steps + warm)
    task |= {"problems": problems, "samples": samples, "new_tokens": new, "steps": steps + warm}
    ours: dict[str, list[float]] = {"seconds": [], "processor": []}
    theirs: dict[str, list[float]] = {"seconds": [], "processor": []}
    for _ in range(context.count(1, 2)):
        label = f"{model}: our GRPO, {steps} step(s)"
        spec: dict[str, Any] = {"conditions": ["grpo"], "steps": steps, "warm": warm}
        found = context.cell(label, "conditions", model, overrides, **spec)
        context.say(f"{model}: TRL's GRPOTrainer, {steps} step(s)")
        other = _trl_cell(context, task)
        for kind in ours:
            ours[kind] += found[kind]["grpo"]
            theirs[kind] += other[kind][warm:]
        versions = other["versions"]
    kept = {"ours": summary(ours["seconds"]), "trl": summary(theirs["seconds"]), "versions": versions}
    context.details[f"trl.{model}"] = kept
    wall, busy = (statistics.median(ours[kind]) / statistics.median(theirs[kind]) for kind in ours)
    return [
        Figure(f"trl.{model}.ours", kept["ours"]["median"], "s"),
        Figure(f"trl.{model}.trl", kept["trl"]["median"], "s"),
        Figure(f"trl.{model}.time_over_trl", wall, target=0.5, bound="most"),
        Figure(f"trl.{model}.time_over_trl_processor", busy),
    ]


def _trl_cell(context: Context, task: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="trl-") as folder:
        out, given = Path(folder) / "result.json", Path(folder) / "task.json"
        given.write_text(json.dumps({**task, "folder": folder}))
        command = [str(context.trl_python), str(TRL_DRIVER), str(given), str(out)]
        launch.run(command, threads=context.threads, timeout=PATIENCE, environment={"PYTHONPATH": ""})
        return dict(json.loads(out.read_text()))


# ---------------------------------------------------------------- bfloat16


def precision(context: Context) -> list[Case]:
    """bfloat16 working weights beside float32: time, and how far s, t and u move on the same rollouts."""
    small = [*ONE_RANK, *options(sampling__problems_per_step=2)]
    return [
        Case("time", "smollm2", partial(_precision_time, context, small)),
        Case("drift", "smollm2", partial(_precision_drift, context, small)),
    ]


def _precision_time(context: Context, overrides: Sequence[str]) -> list[Figure]:
    seconds: dict[str, list[float]] = {"float32": [], "bfloat16": []}
    for _ in range(context.count(1, 2)):
        for dtype, values in seconds.items():
            given = [*overrides, *NO_ENDS, *options(model__dtype=dtype)]
            spec: dict[str, Any] = {"conditions": ["antisd"], "steps": context.count(1, 2), "warm": 1}
            found = context.cell(f"smollm2: {dtype}", "conditions", "smollm2", given, **spec)
            values += found["seconds"]["antisd"]
            context.keep_phases(f"smollm2 {dtype}", "antisd", found)
    context.details["precision"] = {dtype: summary(values) for dtype, values in seconds.items()}
    single, half = (statistics.median(values) for values in seconds.values())
    return [
        Figure("precision.smollm2.float32", single, "s"),
        Figure("precision.smollm2.bfloat16", half, "s"),
        Figure("precision.smollm2.speedup", single / half),
    ]


def _precision_drift(context: Context, overrides: Sequence[str]) -> list[Figure]:
    drift = context.cell("smollm2: drift on frozen rollouts", "drift", "smollm2", overrides)
    context.details["precision.drift"] = drift
    return [
        Figure(f"precision.smollm2.{name}_{part}", values[part], "nats")
        for name, values in drift.items()
        for part in ("mean_abs_drift", "mean_drift", "mean_abs")
    ]


SECTIONS: dict[str, Callable[[Context], list[Case]]] = {
    "conditions": conditions,
    "estimators": estimators,
    "sampling": sampling,
    "scaling": scaling,
    "trl": trl,
    "precision": precision,
}

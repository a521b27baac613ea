"""The sections of the benchmark: each runs its measurements and says what came out."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from step import launch
from step.figures import Figure, forwards, padding_share, paired_ratio, phases, summary

from asd_megatron.errors import UserError

PUZZLE, SMOLLM2 = "examples/puzzle/quickstart.yaml", "examples/smollm2/word_problems.yaml"
ONE_RANK = ("--parallelism.tensor", "1", "--parallelism.pipeline", "1", "--parallelism.data", "null")
TRL_DRIVER = Path(__file__).resolve().parents[1] / "trl_env" / "grpo_step.py"


@dataclass
class Context:
    """What sections need beside the machine. `quick`: few repetitions, to see that all works. `say` tells progress."""

    quick: bool
    threads: int
    models: Sequence[str]
    trl_python: Path
    say: Callable[[str], None]
    details: dict[str, Any] = field(default_factory=dict)
    phases: dict[str, dict[str, float]] = field(default_factory=dict)

    def cell(self, label: str, kind: str, spec: dict[str, Any], *, ranks: int = 1) -> dict[str, Any]:
        self.say(label)
        return launch.run_cell(kind, spec, ranks=ranks, threads=self.threads, timeout=900)

    def keep(self, name: str, value: Any) -> None:
        """Into the JSON file."""
        self.details[name] = value

    def count(self, quick: int, full: int) -> int:
        return quick if self.quick else full


def options(**keys: Any) -> list[str]:
    """Overrides of a recipe, `__` for the dot."""
    return [part for key, value in keys.items() for part in (f"--{key.replace('__', '.')}", json.dumps(value))]


# ---------------------------------------------------------------- passes, phases, AntiSD over GRPO, padding


def conditions(context: Context) -> list[Figure]:
    """AntiSD beside GRPO, whole steps in turn in one process."""
    cases = {
        "puzzle": (PUZZLE, ONE_RANK, 1, context.count(6, 40), 3),
        "puzzle_tp2": (PUZZLE, (), 2, context.count(6, 30), 3),
        "smollm2": (SMOLLM2, ONE_RANK, 1, context.count(1, 3), 1),
    }
    figures: list[Figure] = []
    for name, (recipe, extra, ranks, steps, warm) in cases.items():
        if name.partition("_")[0] in context.models:
            spec: dict[str, Any] = {"recipe": recipe, "overrides": list(extra), "conditions": ["grpo", "antisd"]}
            spec |= {"steps": steps, "warm": warm}
            found = context.cell(
                f"{name}: GRPO and AntiSD in turn, {steps} steps each", "conditions", spec, ranks=ranks
            )
            figures += condition_figures(name, found)
            kept = {c: summary(s) for c, s in found["seconds"].items()}
            for c, rows in found["metrics"].items():
                context.phases[f"{name} {c}"] = phases(rows, found["seconds"][c])
                kept[c]["response_tokens"] = statistics.mean(row["response/length_mean"] for row in rows)
            context.keep(name, kept)
    return figures


def condition_figures(name: str, found: dict[str, Any]) -> list[Figure]:
    seconds, extras = found["seconds"], found["extras"]
    figures = []
    for condition, label in (("grpo", "GRPO"), ("antisd", "AntiSD")):
        steps = extras[condition]
        tokens = statistics.median(forwards(s["scored"], s["trained"], s["batch"]) for s in steps)
        rows = found["metrics"][condition]
        trained = [r.get("time/teacher", 0.0) + r.get("time/student", 0.0) + r["time/update"] for r in rows]
        time = paired_ratio(trained, [s["student_forward"] for s in steps])
        figures += [
            Figure(f"{name}.{condition}.forwards_planned", found["plan"][condition], f"({label})"),
            Figure(f"{name}.{condition}.forwards_in_tokens", tokens),
            Figure(f"{name}.{condition}.forwards_in_time", time),
            Figure(f"{name}.{condition}.seconds_a_step", statistics.median(seconds[condition]), "s"),
        ]
    figures.append(
        Figure(f"{name}.antisd_over_grpo", paired_ratio(seconds["antisd"], seconds["grpo"]), target=1.25, bound="most")
    )
    longer = statistics.mean(s["teacher"]["tokens"] / s["batch"] for s in extras["antisd"])
    figures.append(Figure(f"{name}.teacher_tokens_over_student", longer))
    for who in ("student", "teacher"):
        packs = [s[who] for s in extras["antisd"]]
        total, real = sum(p["tokens"] for p in packs), sum(p["real"] for p in packs)
        shared = 1 - real / sum(p["sequences"] for p in packs)
        inside = statistics.mean(p["attention_padding_share"] for p in packs)
        figures += [
            Figure(f"{name}.{who}.padding_share", padding_share(total, real), "%", 0.02, "most"),
            Figure(f"{name}.{who}.shared_share", shared, "%"),
            Figure(f"{name}.{who}.attention_pairs_padding_share", inside, "%"),
        ]
    return figures


# ---------------------------------------------------------------- sampling


def sampling(context: Context) -> list[Figure]:
    """The embedded engine beside `generate`."""
    cases = {
        "puzzle_512": (PUZZLE, 32, 16, 64, False),
        "puzzle_16": (PUZZLE, 4, 4, 64, False),
        "puzzle_16_with_ends": (PUZZLE, 4, 4, 64, True),
        "smollm2_64": (SMOLLM2, 8, 8, 32, False),
    }
    figures = []
    for name, (recipe, problems, samples, new, ends) in cases.items():
        model = name.partition("_")[0]
        if model not in context.models:
            continue
        rounds = context.count(1, 3) if model == "smollm2" else context.count(3, 9)
        spec = {"recipe": recipe, "overrides": list(ONE_RANK), "problems": problems, "samples": samples}
        spec |= {"new_tokens": new, "rounds": rounds, "ends": ends}
        found = context.cell(f"{name}: embedded engine and generate in turn, {rounds} rounds", "sampling", spec)
        rates = found["rates"]
        context.keep(f"sampling.{name}", {way: summary(values) for way, values in rates.items()})
        figures += [Figure(f"sampling.{name}.{way}", statistics.median(rates[way]), "tokens/s") for way in rates]
        target = None if ends else 1.5
        ratio = paired_ratio(rates["embedded"], rates["generate"])
        figures.append(Figure(f"sampling.{name}.over_generate", ratio, target=target, bound="least"))
    return figures


# ---------------------------------------------------------------- weak scaling


def scaling(context: Context) -> list[Figure]:
    """Twice the problems on twice the data-parallel ranks, every response of the full length."""
    if (os.cpu_count() or 1) < 2:
        raise UserError("weak scaling needs two cores")
    cases = {
        "puzzle": (PUZZLE, 4, context.count(6, 20), 3, context.count(1, 2)),
        "smollm2": (SMOLLM2, 2, context.count(1, 2), 1, 1),
    }
    figures = []
    for name, (recipe, problems, steps, warm, turns) in cases.items():
        if name not in context.models:
            continue
        medians: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(turns):
            for ranks, seconds in medians.items():
                fixed = options(sampling__problems_per_step=problems * ranks, sampling__stop_token_ids=[])
                spec: dict[str, Any] = {"recipe": recipe, "overrides": [*ONE_RANK, *fixed, *no_stop(name)]}
                spec |= {"conditions": ["antisd"], "steps": steps, "warm": warm}
                found = context.cell(
                    f"{name}: {problems * ranks} problems on {ranks} rank(s)", "conditions", spec, ranks=ranks
                )
                seconds.append(statistics.median(found["seconds"]["antisd"]))
        context.keep(f"scaling.{name}", medians)
        figures += [Figure(f"scaling.{name}.ranks_{n}", statistics.median(s), "s") for n, s in medians.items()]
        figures.append(Figure(f"scaling.{name}.efficiency", paired_ratio(medians[1], medians[2])))
    return figures


def no_stop(model: str) -> list[str]:
    """SmolLM2's recipe ends responses at a string too."""
    return options(sampling__stop=[]) if model == "smollm2" else []


# ---------------------------------------------------------------- TRL


def trl(context: Context) -> list[Figure]:
    """Our GRPO step beside TRL's, processes in turn; end tokens are forbidden there and end nothing here."""
    if not context.trl_python.is_file():
        raise UserError(
            f"there is no {context.trl_python}: tools/trl_env/create.sh makes it, or name one with --trl-python"
        )
    turns = context.count(1, 2)
    cases = {
        "puzzle": (PUZZLE, 4, 4, 64, context.count(4, 15), 2, 16),
        "smollm2": (SMOLLM2, 2, 8, 32, context.count(1, 2), 1, 16),
    }
    figures = []
    for name, (recipe, problems, samples, new, steps, warm, micro) in cases.items():
        if name not in context.models:
            continue
        fixed = options(
            sampling__problems_per_step=problems,
            sampling__rollouts_per_problem=samples,
            sampling__max_response_tokens=new,
            sampling__stop_token_ids=[],
            model__dtype="float32",
        )
        overrides = [*ONE_RANK, *fixed, *no_stop(name)]
        base = {"recipe": recipe, "overrides": overrides}
        given = context.cell(f"{name}: prompts", "prompts", {**base, "steps": steps + warm})
        theirs_spec = {**given, "problems": problems, "samples": samples, "new_tokens": new}
        theirs_spec |= {"steps": steps + warm, "microbatch": micro}
        ours: list[float] = []
        theirs: list[float] = []
        versions: dict[str, str] = {}
        for _ in range(turns):
            spec = {**base, "conditions": ["grpo"], "steps": steps, "warm": warm}
            ours += context.cell(f"{name}: our GRPO, {steps} steps", "conditions", spec)["seconds"]["grpo"]
            context.say(f"{name}: TRL's GRPOTrainer, {steps} steps")
            seconds, versions = _trl_seconds(context, theirs_spec)
            theirs += seconds[warm:]
        context.keep(f"trl.{name}", {"ours": summary(ours), "trl": summary(theirs), "versions": versions})
        median = statistics.median(ours), statistics.median(theirs)
        figures += [Figure(f"trl.{name}.ours", median[0], "s"), Figure(f"trl.{name}.trl", median[1], "s")]
        figures.append(Figure(f"trl.{name}.time_over_trl", median[0] / median[1], target=0.5, bound="most"))
    return figures


def _trl_seconds(context: Context, spec: dict[str, Any]) -> tuple[list[float], dict[str, str]]:
    with tempfile.TemporaryDirectory(prefix="trl-") as folder:
        out, given = Path(folder) / "result.json", Path(folder) / "spec.json"
        given.write_text(json.dumps({**spec, "folder": folder}))
        command = [str(context.trl_python), str(TRL_DRIVER), str(given), str(out)]
        launch.run(command, threads=context.threads, timeout=900, environment={"PYTHONPATH": ""})
        found = json.loads(out.read_text())
        return found["seconds"], found["versions"]


# ---------------------------------------------------------------- bfloat16


def precision(context: Context) -> list[Figure]:
    """bfloat16 working weights beside float32: time, and how far s, t and u move on the same rollouts."""
    if "smollm2" not in context.models:
        return []
    steps, turns = context.count(1, 2), context.count(1, 2)
    small = [*ONE_RANK, *options(sampling__problems_per_step=2)]
    seconds: dict[str, list[float]] = {"float32": [], "bfloat16": []}
    for _ in range(turns):
        for dtype, values in seconds.items():
            fixed = options(model__dtype=dtype, sampling__stop_token_ids=[], sampling__stop=[])
            spec = {"recipe": SMOLLM2, "overrides": [*small, *fixed], "conditions": ["antisd"]}
            found = context.cell(f"smollm2: {dtype}", "conditions", {**spec, "steps": steps, "warm": 1})
            values += found["seconds"]["antisd"]
            context.phases[f"smollm2 {dtype}"] = phases(found["metrics"]["antisd"], found["seconds"]["antisd"])
    context.keep("precision", {dtype: summary(values) for dtype, values in seconds.items()})
    speedup = statistics.median(seconds["float32"]) / statistics.median(seconds["bfloat16"])
    figures = [Figure(f"precision.smollm2.{d}", statistics.median(s), "s") for d, s in seconds.items()]
    figures.append(Figure("precision.smollm2.speedup", speedup))
    drift = context.cell("smollm2: drift on frozen rollouts", "drift", {"recipe": SMOLLM2, "overrides": small})
    context.keep("precision.drift", drift)
    return figures + [Figure(f"precision.smollm2.{n}_drift", d["mean_abs"], "nats") for n, d in drift.items()]


SECTIONS: dict[str, Callable[[Context], list[Figure]]] = {
    "conditions": conditions,
    "sampling": sampling,
    "scaling": scaling,
    "trl": trl,
    "precision": precision,
}

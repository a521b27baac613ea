"""`asd-megatron quickstart [--section.key value ...]`: train the built-in puzzle's warm-started model, then print what
changed."""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import asd_megatron
from asd_megatron.config import load_recipe
from asd_megatron.distributed.launcher import LAUNCHER
from asd_megatron.distributed.stop_signals import forwarded
from asd_megatron.errors import UserError
from asd_megatron.files import write_json
from asd_megatron.observe.names import graded
from asd_megatron.observe.writer import read_metrics
from asd_megatron.study.results import training_seconds

RECIPE = Path("examples") / "puzzle" / "quickstart.yaml"
WINDOW = 20  # steps averaged for the u of the first and of the last steps
CLASSES = {
    "deliberation": "deliberation words (Let, Wait, ...)",
    "so_early": "So, before a test succeeded",
    "answer_right_early": "right answer, untested",
    "answer_wrong": "wrong answer",
    "candidate": "candidate to test",
    "other": "arithmetic, verdicts",
}


def main(argv: Sequence[str]) -> int:
    """Run the recipe in examples/puzzle/quickstart.yaml and print the table; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="asd-megatron quickstart",
        usage="asd-megatron quickstart [--section.key value ...]",
        description=(
            "150 AntiSD steps on the built-in search puzzle, on two CPU ranks with tensor parallelism 2, then a table "
            "of what changed. Takes some minutes. Arguments override keys of examples/puzzle/quickstart.yaml "
            "(docs/recipes.md)."
        ),
    )
    if any(a in ("-h", "--help") for a in argv):
        parser.print_help()
        return 0
    recipe = find_recipe()
    overrides = ["--run.overwrite", "true", "--checkpoint.resume", "never", *argv]
    folder = load_recipe(recipe, overrides).run.path
    command = [sys.executable, "-m", "asd_megatron.cli.main", "train", str(recipe), *overrides]
    environment = os.environ | {LAUNCHER: str(os.getpid())}  # training ends with this process
    status = run(command, environment)
    if status or not (folder / "summary.json").is_file():  # asked to stop before its end: the run has said so
        return status
    summary = summarize(folder)
    write_json(folder / "summary.json", summary)
    print(table(summary))
    print(f"\n{folder}: curves.png, summary.json, hf/ (a Hugging Face model), metrics.jsonl, tensorboard/")
    return 0


def run(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run the training and return its exit status. It is in a session of its own, so that a terminal signals this
    process alone, which passes requests to stop on and waits."""
    started: list[int] = []

    def unheard(number: int) -> None:
        raise KeyboardInterrupt

    with forwarded(lambda: started, unheard=unheard):
        training = subprocess.Popen(command, env=environment, start_new_session=True)
        started.append(training.pid)
        return training.wait()


def find_recipe() -> Path:
    """The quickstart's recipe, here or beside the package in a clone."""
    for root in (Path(), Path(asd_megatron.__file__).parent.parent):
        if (root / RECIPE).is_file():
            return root / RECIPE
    raise UserError(f"{RECIPE} is not here: run the quickstart from a clone of the repository")


def summarize(folder: Path) -> dict[str, Any]:
    """The run's summary.json with what the puzzle shows: before and after, u by token class, the gate."""
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    steps = [row for row in read_metrics(folder) if "reward/mean" in row]
    first, last = steps[:WINDOW], steps[-WINDOW:]
    summary["u_by_class"] = {
        name: {"first_steps": _mean(first, f"puzzle/u_{name}"), "last_steps": _mean(last, f"puzzle/u_{name}")}
        for name in CLASSES
    }
    if any("gate/open" in row for row in steps):
        summary["gate"] |= {
            "open_share_after_warmup": _mean([r for r in steps if not r["gate/warming_up"]], "gate/open"),
            "entropy_first_steps": _mean(first, "gate/entropy"),
            "entropy_last_steps": _mean(last, "gate/entropy"),
        }
    summary["seconds"] = {
        "training_steps": training_seconds(steps)[-1],
        "evaluations": math.fsum(r.get("time/evaluate", 0.0) for r in steps),
    }
    summary["engine_mismatch_max_abs"] = max(r["mismatch/max_abs"] for r in steps)
    return summary


def _mean(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = [row[name] for row in rows if row.get(name) is not None]
    return sum(values) / len(values) if values else None


def table(summary: Mapping[str, Any]) -> str:
    """The table of what changed, as text."""
    before, after = summary["evaluation_before"], summary["evaluation_after"]
    lines = ["", f"{'held-out puzzles':38s} {'before':>8s} {'after':>8s}"]
    mean = "mean reward" if graded([before, after]) else "accuracy"
    for name, label in (
        ("accuracy", mean),
        ("length_mean", "response length (tokens)"),
        ("deliberations", "deliberation words a response"),
        ("deliberation_rate", "deliberation words, fraction of tokens"),
        ("verified", "fraction of answers that were tested"),
    ):
        lines.append(
            f"{label:38s} {_number(before.get(f'evaluation/{name}'))} {_number(after.get(f'evaluation/{name}'))}"
        )
    lines += ["", f"{f'mean u in training (nats, {WINDOW} steps)':38s} {'first':>8s} {'last':>8s}"]
    for name, label in CLASSES.items():
        u = summary["u_by_class"][name]
        lines.append(f"{label:38s} {_number(u['first_steps'])} {_number(u['last_steps'])}")
    gate = summary.get("gate", {})
    lines.append("")
    if "open_share_after_warmup" in gate:
        h_warm, h_first, h_last, open_share = (
            _number(gate[name]).strip()
            for name in ("h_warm", "entropy_first_steps", "entropy_last_steps", "open_share_after_warmup")
        )
        lines.append(
            f"gate: H_warm {h_warm}, open in {open_share} of the steps after the warm-up, "
            f"teacher's median entropy {h_first} -> {h_last} nats"
        )
    lines.append(f"engine against trainer log-probs: max |difference| {summary['engine_mismatch_max_abs']:.1e}")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return f"{'-':>8s}" if value is None else f"{value:8.3f}"

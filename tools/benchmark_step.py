"""What a training step costs: passes and phases, AntiSD beside GRPO, the exact divergence beside the sampled term,
sampling beside `generate`, padding, weak scaling, TRL's GRPOTrainer on the same task, and bfloat16 working weights.

Every measurement runs in processes of its own; what is compared runs in turn, and medians count. Ratios are of wall
time; those named `_processor` of processor time, which others disturb less. Needs SmolLM2 and its
problems (examples/smollm2/make_model.py, make_problems.py) unless `--models puzzle`; the section `trl` needs the
environment of tools/trl_env/create.sh.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from machine_load import machine, others, wait_until_quiet
from step.figures import Figure, phase_table, table
from step.sections import SECTIONS, SMOLLM2, Context

from asd_megatron.config import load_recipe
from asd_megatron.errors import UserError
from asd_megatron.files import write_json

MODELS = ("puzzle", "smollm2")
QUIET = 0.1  # share of the cores that others may use before a section starts


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    parser.add_argument(
        "--only",
        metavar="SECTIONS",
        help=f"comma-separated, of {', '.join(SECTIONS)} (default: all), or cases of them: conditions.puzzle",
    )
    parser.add_argument("--models", default=",".join(MODELS), help="puzzle, smollm2 or both (default)")
    parser.add_argument("--threads", type=int, default=1, help="of each rank and of what is compared (default: 1)")
    parser.add_argument("--quick", action="store_true", help="few repetitions: whether it works, not how fast it is")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds to wait for quiet before each section")
    parser.add_argument("--trl-python", default=".venv-trl/bin/python", help="interpreter of the TRL environment")
    arguments = parser.parse_args(argv)
    try:
        sections = _sections(arguments.only or ",".join(SECTIONS))
        models = _chosen(arguments.models, MODELS, "--models")
        _check_smollm2(models)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started:5.0f} s] {text}", flush=True)

    context = Context(arguments.quick, arguments.threads, Path(arguments.trl_python), say)
    report: dict[str, Any] = {"machine": machine(arguments.threads), "quick": arguments.quick}
    report |= {"others": {}, "errors": {}, "phases": context.phases, "details": context.details}
    figures: list[Figure] = []
    for name, only in sections.items():
        wait_until_quiet(QUIET, time.monotonic() + arguments.patience)
        with others() as share:
            figures += _measured(name, only, context, models, report["errors"])
        report["others"][name] = share[0]
        report["figures"] = {figure.name: {**asdict(figure), "met": figure.met} for figure in figures}
        report["seconds"] = time.monotonic() - started
        if arguments.json:
            write_json(arguments.json, report)  # after every section: a later one may be interrupted
    _show(report, figures)
    return 1 if report["errors"] else 0


def _measured(
    section: str, only: Collection[str], context: Context, models: Collection[str], errors: dict[str, str]
) -> list[Figure]:
    """A section's figures (`only`: of these cases, if any); one that fails is told, kept in `errors` and left out."""
    figures: list[Figure] = []
    try:
        cases = SECTIONS[section](context)
    except UserError as error:
        errors[section] = str(error)
        print(f"{section}: {error}", file=sys.stderr, flush=True)
        return figures
    known = [case.name for case in cases]
    for name in only:
        if name not in known:
            errors[f"{section}.{name}"] = f"--only {section}.{name}: there is none; choose of {', '.join(known)}"
            print(errors[f"{section}.{name}"], file=sys.stderr, flush=True)
    for case in cases:
        if only and case.name not in only:
            continue
        try:
            figures += case.run() if case.model in models else []
        except UserError as error:
            errors[f"{section}.{case.name}"] = str(error)
            print(f"{section}, {case.name}: {error}", file=sys.stderr, flush=True)
    return figures


def _show(report: Mapping[str, Any], figures: Sequence[Figure]) -> None:
    where = report["machine"]
    print(f"\n{where['cpu']}, {where['cores']} cores, {where['threads']} thread(s) a rank, torch {where['torch']}")
    disturbed = ", ".join(f"{name} {share:.0%}" for name, share in report["others"].items())
    print(f"others used of the cores meanwhile: {disturbed}")
    print("\n" + table(figures))
    if report["phases"]:
        print("\n" + phase_table(report["phases"]))


def _sections(given: str) -> dict[str, list[str]]:
    """The chosen sections, each with its chosen cases; none of them: all."""
    cases: dict[str, list[str]] = {}
    for part in given.split(","):
        section, dot, case = part.partition(".")
        cases.setdefault(section, []).extend([case] if dot else [])
    _chosen(",".join(cases), SECTIONS, "--only")
    return cases


def _chosen(given: str, known: Collection[str], option: str) -> list[str]:
    chosen = given.split(",")
    for name in chosen:
        if name not in known:
            raise UserError(f"{option} {name}: there is none; choose of {', '.join(known)}")
    return chosen


def _check_smollm2(models: Sequence[str]) -> None:
    if "smollm2" not in models:
        return
    recipe = load_recipe(SMOLLM2, [])
    for path in (recipe.model.path, recipe.data.train_name):
        if not Path(path).exists():
            raise UserError(f"there is no {path}: `make smollm2` makes it, or choose --models puzzle")


if __name__ == "__main__":
    sys.exit(main())

"""`asd-megatron plan RECIPE [MORE.yaml ...] [--gpus N] ...`: what the recipe needs on GPUs that are not here.

Options of the plan have no dot in their names, keys of the recipe have one: `--gpus 16 --parallelism.tensor 4`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from asd_megatron.cli.guard import importing
from asd_megatron.config import load_recipe
from asd_megatron.errors import UserError
from asd_megatron.files import user_error, write_json

MOST = {"gpus": 65_536, "nodes": 8_192, "response_tokens": 10**8, "prompt_tokens": 10**8}
"""What an option is at most: proposals for millions of GPUs would take minutes."""
MOST_PROPOSALS = 1_000


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="asd-megatron plan",
        usage="asd-megatron plan RECIPE [MORE.yaml ...] [options] [--section.key value ...]",
        description="Work out, without any GPU, what a recipe needs on given ones: memory of every rank item by item,"
        " seconds of every phase of a step, its cost, and the layouts that fit, fastest first (docs/planning.md).",
        epilog="Exit status 0 if the recipe fits, 1 if it does not.",
        allow_abbrev=False,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file; keys of further ones replace its keys")
    parser.add_argument("--gpu", default="h100", metavar="NAME", help="a100, h100, h200, b200, ... [%(default)s]")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--gpus", type=int, metavar="N", help="in all, the servers' included [what the recipe needs]")
    size.add_argument("--nodes", type=int, metavar="N", help="the same as 8 GPUs for each node")
    parser.add_argument("--response-tokens", type=float, metavar="N", help="median [a quarter of the recipe's limit]")
    parser.add_argument("--prompt-tokens", type=float, metavar="N", help="mean [256]")
    parser.add_argument("--spread", type=float, default=0.8, help="of the logarithm of response lengths [%(default)s]")
    parser.add_argument("--price", type=float, metavar="DOLLARS", help="of one GPU for an hour [a list price]")
    parser.add_argument(
        "--proposals", type=int, default=5, metavar="N", help="layouts to propose [%(default)s]; 0: none"
    )
    parser.add_argument("--calibrate", action="store_true", help="with rates measured on this machine, in some seconds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan there too")
    return parser


def main(argv: Sequence[str]) -> int:
    """Print the plan; returns 0 if the recipe fits, else 1. Raises UserError for a recipe that cannot be planned."""
    options, given = split_options(argv)
    recipe = load_recipe(given[0], given[1:])
    with importing("interrupted"):
        from asd_megatron.planner.report import plan_json, plan_text
        from asd_megatron.run import planning
    gpu = planning.hardware(options.gpu, calibrate=options.calibrate, price=options.price)
    expected = planning.Expected(options.prompt_tokens, options.response_tokens, options.spread)
    gpus = options.gpus or (options.nodes or 0) * gpu.per_node or None
    plan = planning.plan_recipe(recipe, gpu, gpus, expected, proposals=options.proposals)
    print(plan_text(plan))
    if options.json is not None:
        with user_error(f"--json {options.json} cannot be written", "name a file in a folder of yours"):
            write_json(options.json, plan_json(plan))
    return 0 if plan.fits else 1


def split_options(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """(options of the plan, [recipe, further files, overrides]). Raises UserError for sizes that cannot be."""
    options, rest = _parser().parse_known_args(argv)
    for name, most in MOST.items():
        value = getattr(options, name)
        if value is not None and not 0 < value <= most:
            raise UserError(f"--{name.replace('_', '-')} {value:.12g}: expected a number above 0, at most {most:,}")
    if options.price is not None and not 0 <= options.price < math.inf:
        raise UserError(f"--price {options.price:g}: expected dollars of one GPU for an hour, 0 or more")
    if not 0 <= options.proposals <= MOST_PROPOSALS:
        raise UserError(f"--proposals {options.proposals}: expected 0 (none) to {MOST_PROPOSALS}")
    if options.json is not None and options.json.is_dir():
        raise UserError(f"--json {options.json} is a folder: name a file, such as {options.json / 'plan.json'}")
    if not 0 <= options.spread <= 3:
        raise UserError(f"--spread {options.spread:g}: expected 0 (all responses equal) to 3")
    return options, [options.recipe, *rest]

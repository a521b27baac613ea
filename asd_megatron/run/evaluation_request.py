"""What `asd-megatron evaluate` is asked for: its command line, read alike by the launcher and by every rank."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asd_megatron.errors import UserError

OVERRIDE = re.compile(r"--[a-z_]+\.[A-Za-z0-9_.+-]+(=.*)?", re.DOTALL)
OF_SETS = ("samples", "temperature", "top_p", "top_k", "max_new_tokens", "reward", "problems")
"""Options for all sets; each replaces the key of that name of every set."""


@dataclass(frozen=True)
class Request:
    """`what`: recipes, run folders, model folders, checkpoints. `sets`: NAME=DATA, or names of the recipe's sets; ():
    those of the recipe. `values`: settings for all sets, by key. `steps`: of run folders; () with `every_step`: all.
    `overrides`: recipe keys, as `--section.key value`."""

    what: tuple[str, ...]
    sets: tuple[str, ...] = ()
    values: tuple[tuple[str, Any], ...] = ()
    steps: tuple[int, ...] = ()
    every_step: bool = False
    recipe: str | None = None
    out: Path | None = None
    overwrite: bool = False
    plot: bool = False
    sft: bool = False
    overrides: tuple[str, ...] = ()


def read_request(argv: Sequence[str]) -> Request:
    """The request of a command line. Raises UserError; prints the help and ends with status 0 for --help."""
    plain, overrides = _apart(argv)
    given = parser().parse_args(plain)
    if given.all and given.step:
        raise UserError("--all evaluates every step, --step some of them: give one of the two")
    values = {key: getattr(given, key) for key in OF_SETS if getattr(given, key) is not None}
    return Request(
        tuple(given.what),
        tuple(given.sets or ()),
        tuple(values.items()),
        tuple(given.step or ()),
        given.all,
        given.recipe,
        given.out,
        given.overwrite,
        given.plot,
        given.sft,
        tuple(overrides),
    )


def _apart(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The command line without recipe overrides, and these: argparse would take their values for folders."""
    plain: list[str] = []
    overrides: list[str] = []
    words = iter(argv)
    for word in words:
        match = OVERRIDE.fullmatch(word)
        if match is None:
            plain.append(word)
            continue
        overrides.append(word)
        if match[1] is None:
            value = next(words, None)
            if value is None:
                raise UserError(f"override {word} has no value: write `{word} value`")
            overrides.append(value)
    return plain, overrides


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UserError(f"asd-megatron evaluate: {message} (see --help)")


def parser() -> argparse.ArgumentParser:
    """Of the command line without recipe overrides."""
    found = _Parser(
        prog="asd-megatron evaluate",
        usage="asd-megatron evaluate WHAT [WHAT ...] [--sets NAME=DATA ...] [options] [--section.key value ...]",
        description=(
            "Answer sets of problems several times each and write samples-SET.parquet, results.json, results.csv and"
            " pass_at_k.png. Started again, it continues with what is missing. Several models are compared in one"
            " table, problem by problem, with the first. docs/evaluation.md defines every number."
        ),
        epilog=(
            "examples:\n"
            "  asd-megatron evaluate recipe.yaml\n"
            "  asd-megatron evaluate runs/grpo runs/antisd --samples 32\n"
            "  asd-megatron evaluate runs/antisd --all --sets aime=aime25.jsonl --problems 100\n"
            "  asd-megatron evaluate FOLDER_OF_A_MODEL --sets gsm8k=gsm8k_test.jsonl --samples 8 --max-new-tokens 512\n"
            "  asd-megatron evaluate --plot runs/grpo runs/antisd"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    found.add_argument(
        "what",
        nargs="+",
        metavar="WHAT",
        help="a recipe (its model.path), a run folder (its newest checkpoint, else export), a checkpoint of a run, or a"
        " Hugging Face folder; the first of several is the baseline",
    )
    found.add_argument(
        "--sets",
        nargs="+",
        action="extend",
        metavar="NAME=DATA",
        help="a problem file (or puzzle:test, reasoning_gym:TASK) with a name for it, or the name of a set of the"
        " recipe (`test` is its data.test); default: all of the recipe",
    )
    numbers = found.add_argument_group("settings of all sets (instead of the recipe's)")
    numbers.add_argument("--samples", type=int, help="responses for each problem [1]")
    numbers.add_argument("--temperature", type=float, help="sampling temperature, 0: greedy [0.7]")
    numbers.add_argument("--top-p", type=float, help="nucleus filter [0.95]")
    numbers.add_argument("--top-k", type=int, help="the k likeliest tokens, 0: off [0]")
    numbers.add_argument("--max-new-tokens", type=int, help="longest response [sampling.max_response_tokens]")
    numbers.add_argument("--reward", help="reward.name: math, exact, FILE.py:FUNCTION, ... [the recipe's, or math]")
    numbers.add_argument("--problems", type=int, help="the first so many problems of each set [all]")
    found.add_argument("--step", type=int, action="append", help="of run folders: this step; may be repeated")
    found.add_argument("--all", action="store_true", help="of run folders: every checkpoint and export")
    found.add_argument("--recipe", metavar="FILE", help="of model folders: the settings of this recipe")
    found.add_argument("--sft", action="store_true", help="recipes are those of `asd-megatron sft`")
    found.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="where results go [RUN/evaluation/step_NNNNNN of a run, else evaluation/NAME]",
    )
    found.add_argument("--overwrite", action="store_true", help="begin again instead of continuing")
    found.add_argument("--plot", action="store_true", help="answer nothing: draw what runs have measured so far")
    return found

"""`asd-megatron recipes`: the reference of every recipe key, made from the schema."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from asd_megatron.config import render_reference
from asd_megatron.errors import UserError


def main(argv: Sequence[str]) -> int:
    """Print the page, write it to a file, or check that a file is up to date (UserError if it is not)."""
    parser = argparse.ArgumentParser(prog="asd-megatron recipes", description="The reference of every recipe key.")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--write", metavar="FILE", type=Path, help="write the page (docs/recipes.md)")
    action.add_argument("--check", metavar="FILE", type=Path, help="fail unless FILE is the page")
    arguments = parser.parse_args(argv)
    page = render_reference()
    if arguments.write is not None:
        arguments.write.parent.mkdir(parents=True, exist_ok=True)
        arguments.write.write_text(page, encoding="utf-8")
    elif arguments.check is not None:
        if not arguments.check.is_file() or arguments.check.read_text(encoding="utf-8") != page:
            raise UserError(f"{arguments.check} is not up to date with the recipe schema: run `make docs`")
    else:
        print(page, end="")
    return 0

"""`asd-megatron drill [FAULT ...] [--json FILE] [--write PAGE] [--folder FOLDER]`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str]) -> int:
    """Disturb small runs and check what becomes of them; returns 1 when a fault is not handled as promised."""
    parser = argparse.ArgumentParser(
        prog="asd-megatron drill",
        description=(
            "Train a small model on two CPU ranks again and again, and break it each time in another way: a rank is"
            " killed, a signal arrives, the disk is full, a checkpoint is damaged. Checks how the run ends, what it"
            " says, and that the same command then ends with the weights of an undisturbed run. Takes about ten minutes"
            " on two CPU cores."
        ),
    )
    parser.add_argument("faults", nargs="*", metavar="FAULT", help="faults to try (default: all); --list names them")
    parser.add_argument("--list", action="store_true", help="name the faults, with what is expected of each, and end")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the outcomes to FILE")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table into a page (docs/reliability.md)")
    parser.add_argument(
        "--folder", type=Path, metavar="FOLDER", help="keep recipes, logs and runs there (default: a temporary one)"
    )
    arguments = parser.parse_args(argv)
    from asd_megatron.checks.drill import drill  # torch: not for --help

    if arguments.list:
        print(drill.listing())
        return 0
    return drill.main(arguments.faults, json_file=arguments.json, page=arguments.write, folder=arguments.folder)

"""`asd-megatron parity [LAYOUT ...] [--json FILE]`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str]) -> int:
    """Check that an AntiSD update is the same in every layout; returns 1 when a cell fails."""
    from asd_megatron.checks import parity
    from asd_megatron.checks.layouts import CELLS

    layouts = ", ".join(n for n, c in CELLS.items() if n != c.reference)
    parser = argparse.ArgumentParser(
        prog="asd-megatron parity",
        description=(
            "Run AntiSD updates on a deliberately hard batch in every parallel layout and compare losses, every "
            "gradient and every weight change with one process. Takes about two minutes on two CPU cores."
        ),
        epilog=f"layouts: {layouts}",
    )
    parser.add_argument("layouts", nargs="*", metavar="LAYOUT", help="layouts to check (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the cells with their errors to FILE")
    arguments = parser.parse_args(argv)
    return parity.main(arguments.layouts, arguments.json)

"""`asd-megatron parity [LAYOUT ...] [--json FILE]`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str]) -> int:
    """Check that an AntiSD update is the same in every layout; returns 1 when a cell fails."""
    from asd_megatron.checks import parity
    from asd_megatron.checks.layouts import cells_of

    layouts = ", ".join(cells_of("local", "float32"))
    parser = argparse.ArgumentParser(
        prog="asd-megatron parity",
        description=(
            "Run AntiSD updates on a deliberately hard batch in every parallel layout and compare losses, every "
            "gradient and every weight change with one process. Takes about two minutes on two CPU cores."
        ),
        epilog=f"layouts: {layouts}; with te_, bf16_ or te_bf16_ in front those of other layers and dtypes",
    )
    parser.add_argument("layouts", nargs="*", metavar="LAYOUT", help="layouts to check (default: all)")
    parser.add_argument(
        "--layers",
        choices=("local", "te"),
        default="local",
        help="layer implementation of all layouts (default: local)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="bfloat16: errors are compared with those of one bfloat16 process (default: float32; bfloat16 with te)",
    )
    parser.add_argument("--ranks", type=int, metavar="N", help="check only layouts of N ranks (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the cells with their errors to FILE")
    arguments = parser.parse_args(argv)
    dtype = arguments.dtype or ("bfloat16" if arguments.layers == "te" else "float32")
    return parity.main(arguments.layouts, arguments.json, layers=arguments.layers, dtype=dtype, ranks=arguments.ranks)

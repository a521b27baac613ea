"""`asd-megatron models-table [FAMILY ...] [--layouts ...] [--json FILE] [--write PAGE]`."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str]) -> int:
    """Compare every model family in every layout with transformers; returns 1 when a cell fails."""
    from asd_megatron.checks import models_page, models_table
    from asd_megatron.checks.model_cells import LAYOUTS
    from asd_megatron.checks.random_models import FAMILIES
    from asd_megatron.errors import UserError
    from asd_megatron.files import read_json_object, write_json

    parser = argparse.ArgumentParser(
        prog="asd-megatron models-table",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Compare every model family in every parallel layout with transformers, on random models: logits and\n"
            "gradients in float32, and whether a folder comes back bit for bit, in float32 and bfloat16. Without\n"
            "FAMILY and --layouts also bfloat16 against float32, and models of the sizes of published ones through\n"
            "one training step. Exit status 1 when a cell fails. Everything takes about ten minutes on two CPU cores\n"
            "and 4 GB of memory; one family in one layout half a minute."
        ),
        epilog=f"families: {', '.join(FAMILIES)}\nlayouts: {', '.join(LAYOUTS)}",
    )
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="families to check (default: all)")
    parser.add_argument("--layouts", nargs="+", default=[], metavar="LAYOUT", help="layouts to check (default: all)")
    parser.add_argument(
        "--smollm2",
        type=Path,
        metavar="FOLDER",
        help="SmolLM2-135M-Instruct of examples/smollm2/make_model.py: also it",
    )
    parser.add_argument(
        "--folders", type=Path, metavar="FILE", help="take in the figures of `tools/benchmark_folders.py --json FILE`"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="write the tables into PAGE (docs/models.md)")
    given = parser.parse_args(argv)
    narrowed = bool(given.families or given.layouts)
    if narrowed and (given.write or given.smollm2):
        raise UserError("--write and --smollm2 go with the complete table: leave out FAMILY and --layouts")
    folders = None
    if given.folders is not None:
        folders = read_json_object(given.folders, "write it with `python tools/benchmark_folders.py --json FILE`")

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(prefix="asd-models-") as root:
        report = models_table.measure(given.families, given.layouts, Path(root), smollm2=given.smollm2, say=say)
    if folders is not None:
        report["folders"] = folders
    print(models_page.lines(report["cells"]) if narrowed else models_page.measured(report))
    if given.json is not None:
        write_json(given.json, report)
    if given.write is not None:
        models_page.write_page(given.write, report)
    failed = models_table.failed(report)
    if failed:
        say(f"the models table FAILED in {', '.join(failed)}")
    return 1 if failed else 0

"""`asd-megatron checkpoint list | inspect | verify`: the training checkpoints of a run, without a model or a GPU."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from asd_megatron.cli.guard import FAILED, importing
from asd_megatron.errors import UserError
from asd_megatron.files import to_json

SHOWN = 8  # problems of one checkpoint


def main(argv: Sequence[str]) -> int:
    """Run one of the tools. `verify` returns 1 when something is wrong with a checkpoint, `list` when something is
    wrong with the one that the run continues from."""
    arguments = _parser().parse_args(argv)
    with importing("interrupted"):
        import torch  # noqa: F401 - it and what follows take seconds to import
    return int(arguments.run(arguments) or 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="asd-megatron checkpoint", description="List, inspect and verify training checkpoints."
    )
    tools = parser.add_subparsers(dest="tool", required=True, metavar="TOOL")
    for name, run, what, summary, description, example in TOOLS:
        tool = tools.add_parser(
            name, help=summary, description=description, epilog=f"example: asd-megatron checkpoint {name} {example}"
        )
        tool.add_argument("path", type=Path, metavar=what.partition(":")[0], help=what.partition(": ")[2])
        tool.set_defaults(run=run)
        tool.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _folder(path: Path) -> Path:
    """The `checkpoints` folder of a run, which may be given itself. UserError for anything else."""
    from asd_megatron.checkpoint.lineage import LATEST, all_of
    from asd_megatron.run.folder import CHECKPOINTS
    from asd_megatron.run.history import HISTORY_FILE

    for folder in (path / CHECKPOINTS, path):
        if (folder / LATEST).exists() or all_of(folder):
            return folder
    if (path / HISTORY_FILE).is_file():
        raise UserError(f"the run in {path} has no checkpoint yet")
    raise UserError(f"{path} is no run folder (from {Path.cwd()}): give the folder runs/NAME of a run")


def _list(arguments: Any) -> int:
    from asd_megatron.checkpoint.distcp import size_text
    from asd_megatron.checkpoint.verification import statuses

    found = statuses(_folder(arguments.path))
    if arguments.json:
        print(to_json({"checkpoints": [status.as_json() for status in found]}, indent=2))
    else:
        rows = [("checkpoint", "stage", "layout of the writer", "size", "age", "state")]
        for status in found:
            state = f"{status.problem or 'intact'}{' <- latest' if status.latest else ''}"
            size, age = size_text(status.bytes), _age(status.age_seconds)
            rows.append((status.name, status.stage or "?", status.layout or "?", size, age, state))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
        for row in rows:
            print("  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[-1]]))
    return FAILED if any(status.latest and status.problem for status in found) else 0


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def _inspect(arguments: Any) -> int:
    from asd_megatron.checkpoint.inspection import inspect
    from asd_megatron.checkpoint.locate import find

    report = inspect(find(arguments.path))
    print(to_json(report.as_json(), indent=2) if arguments.json else report.text())
    return 0


def _all_and_latest(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, and the one that `latest` names if it is not there."""
    from asd_megatron.checkpoint.lineage import all_of, named

    found, newest = all_of(folder), named(folder)
    return [*found, *([newest] if newest is not None and newest not in found else [])]


def _verify(arguments: Any) -> int:
    from tqdm import tqdm

    from asd_megatron.checkpoint.lineage import RUN_STATE
    from asd_megatron.checkpoint.manifest import MANIFEST
    from asd_megatron.checkpoint.verification import NO_MANIFEST, problems, total_bytes

    path: Path = arguments.path
    itself = any((path / name).exists() for name in (RUN_STATE, MANIFEST, ".metadata"))
    found: dict[Path, list[str]] = {}
    checkpoints = [path] if itself else _all_and_latest(_folder(path))
    total = sum(map(total_bytes, checkpoints))
    with tqdm(total=total, unit="B", unit_scale=True, file=sys.stderr, disable=not sys.stderr.isatty()) as bar:
        for checkpoint in checkpoints:
            found[checkpoint] = list(problems(checkpoint, bar.update))
    if arguments.json:
        content = [{"checkpoint": str(path), "intact": not wrong, "problems": wrong} for path, wrong in found.items()]
        print(to_json({"checkpoints": content}, indent=2))
    for checkpoint, wrong in () if arguments.json else found.items():
        note = "" if (checkpoint / MANIFEST).is_file() or wrong else f"; {NO_MANIFEST}"
        print(f"{checkpoint}: {'DAMAGED' if wrong else f'intact{note}'}")
        for problem in wrong[:SHOWN]:
            print(f"  {problem}")
        if len(wrong) > SHOWN:
            print(f"  and {len(wrong) - SHOWN} more")
    return FAILED if any(found.values()) else 0


TOOLS: tuple[tuple[str, Callable[[Any], int], str, str, str, str], ...] = (
    (
        "list",
        _list,
        "RUN: a run folder",
        "the checkpoints of a run",
        "Step, stage, the writer's layout, size, age, and whether all files are there with their sizes. Reads small"
        " files alone. Exits with 1 when the checkpoint that the run continues from lacks something.",
        "runs/quickstart",
    ),
    (
        "inspect",
        _inspect,
        "PATH: a checkpoint, or a run folder: its newest",
        "what a checkpoint holds",
        "As `asd-megatron convert inspect`: step, layout, precision, and every tensor.",
        "runs/quickstart/checkpoints/step_000020",
    ),
    (
        "verify",
        _verify,
        "PATH: a checkpoint (RUN/checkpoints/step_NNNNNN), or a run",
        "compare every file with its checksum",
        "Reads every file of a checkpoint, or of all of a run's, and compares it with the manifest. Exits with 1 when a"
        " file is missing or has changed.",
        "runs/quickstart",
    ),
)
"""Each: name, function, argument and its help, help, description, example."""

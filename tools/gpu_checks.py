"""What only GPUs can show, one row a check, each in a process of its own; a table at the end (docs/gpu_checks.md).

Rows that this machine cannot run are named with the reason. Exit status: 0, 1 when a row failed or was not run, 130
when interrupted.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout that is not installed

from gpu.machine import Machine, as_json, probe
from gpu.rows import ROWS, Row
from gpu.running import Interrupted, Outcome, Runner, table

from asd_megatron.errors import UserError
from asd_megatron.files import user_error, write_json

RESULTS = ("ok", "FAILED", "not runnable", "not run")


def select(names: Sequence[str], rows: Sequence[Row]) -> list[Row]:
    """The named rows, or all. Raises KeyError with the names that there are not."""
    unknown = sorted(set(names) - {row.name for row in rows})
    if unknown:
        raise KeyError(", ".join(unknown))
    return [row for row in rows if not names or row.name in names]


def check(rows: Sequence[Row], machine: Machine, folder: Path, arguments: argparse.Namespace) -> int:
    """Run the rows, print the table, write the report; returns the exit status."""
    deadline = time.monotonic() + arguments.time_limit if arguments.time_limit else float("inf")
    runner = Runner(machine, folder, _say, deadline=deadline)
    interrupted = False
    try:
        outcomes = runner.run(rows, stop_at_failure=not arguments.keep_going)
    except Interrupted as error:
        outcomes, interrupted = error.outcomes, True
    print(f"\n{machine.text()}\n\n{table(outcomes)}\n")
    counts = Counter(outcome.result for outcome in outcomes)
    print(", ".join(f"{counts[result]} {result}" for result in RESULTS) + f"; logs: {folder}")
    if arguments.json:
        write_json(arguments.json, {"machine": as_json(machine), "rows": [outcome.as_json() for outcome in outcomes]})
    return 130 if interrupted else _status(outcomes, arguments.require_all)


def _status(outcomes: Sequence[Outcome], require_all: bool) -> int:
    bad = {"FAILED", "not run", *(["not runnable"] if require_all else [])}
    return int(any(outcome.result in bad for outcome in outcomes))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--list", action="store_true", help="print the rows with what they need, and run none")
    made.add_argument("--only", nargs="+", default=[], metavar="ROW", help="run these rows alone")
    made.add_argument("--json", type=Path, metavar="FILE", help="also write machine, results and figures to FILE")
    made.add_argument("--logs", type=Path, metavar="FOLDER", help="of logs and reports (default: a new one)")
    made.add_argument(
        "--keep-going",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="run the other rows after one has failed (default: yes)",
    )
    made.add_argument(
        "--time-limit",
        type=float,
        metavar="SECONDS",
        help="for all rows together; what has not begun by then is not run (default: each row's own limit alone)",
    )
    made.add_argument("--require-all", action="store_true", help="rows that are not runnable here count as failed")
    return made


def _writable(arguments: argparse.Namespace) -> Path:
    """The folder of logs, which exists then. Raises UserError where it or the report cannot be written."""
    with user_error("--logs cannot be used", "give another folder"):
        folder = arguments.logs or Path(tempfile.mkdtemp(prefix="asd-gpu-checks-"))
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    if arguments.json:
        with user_error("--json cannot be written", "give another file"):
            write_json(arguments.json, {"rows": []})
    return folder


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        rows = select(arguments.only, ROWS)
    except KeyError as error:
        print(f"error: no such row: {error.args[0]}; --list prints all", file=sys.stderr)
        return 2
    if arguments.list:
        for row in rows:
            print(f"{row.name:18s} {row.needs}\n{'':18s} {row.shows}")
        return 0
    for number in (signal.SIGINT, signal.SIGTERM):  # a scheduler's end of the job prints the table too
        signal.signal(number, _interrupt)
    try:
        folder = _writable(arguments)
        _say("probing this machine")
        return check(rows, probe(), folder.resolve(), arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted before the first row", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

"""`asd-megatron stop RUN`: ask a run to stop after the step in flight."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from asd_megatron import locks
from asd_megatron.errors import UserError
from asd_megatron.files import user_error
from asd_megatron.run.folder import LOCK_FILE, STOP_FILE
from asd_megatron.run.history import HISTORY_FILE


def main(argv: Sequence[str]) -> int:
    """Write RUN/stop; returns 0. Raises UserError when no run can be there to read it."""
    parser = argparse.ArgumentParser(
        prog="asd-megatron stop",
        description=(
            "Ask a run to stop: it finishes the step in flight (one that waits for SGLang rollouts is abandoned), saves"
            f" its state and ends with status 0. Writes the file RUN/{STOP_FILE}; works from every machine that sees"
            " the run folder, under every launcher."
        ),
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="the run folder, for instance runs/quickstart")
    folder: Path = parser.parse_args(argv).run
    if not (folder / HISTORY_FILE).is_file():
        raise UserError(f"{folder} holds no {HISTORY_FILE}, so it is no run folder: give the folder runs/NAME of a run")
    if not (folder / LOCK_FILE).exists():
        raise UserError(f"no run is using {folder}: there is nothing to stop")
    with user_error(f"{folder / STOP_FILE} cannot be written", "use the account that started the run"):
        holder = locks.holder(folder / LOCK_FILE)
        (folder / STOP_FILE).touch()
    print(f"asked the run in {folder} to stop; to take it back: rm {folder / STOP_FILE}")
    if holder is None:
        print(
            "warning: its lock is not held, as far as this machine sees: unless it runs on another one whose locks are"
            " not visible here, it was killed, and the next start removes the request"
        )
    return 0

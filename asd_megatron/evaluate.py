"""Evaluation of models: `torchrun --nproc-per-node N -m asd_megatron.evaluate WHAT [WHAT ...] [--sets ...] ...`.

The launcher `asd-megatron evaluate` takes the same arguments.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack

from asd_megatron.cli.guard import as_rank, leave, report_at_once
from asd_megatron.distributed import activity
from asd_megatron.distributed.launcher import launcher_reports
from asd_megatron.distributed.stop_signals import StopSignals
from asd_megatron.observe.progress import print_line
from asd_megatron.run.evaluating import EvaluationSession, evaluate_subject
from asd_megatron.run.evaluation_report import report
from asd_megatron.run.evaluation_request import Request, read_request
from asd_megatron.run.interruption import own_command
from asd_megatron.run.stopping import CAUSES, StopRequested
from asd_megatron.run.subjects import subjects

ANNOUNCEMENT = "the evaluation stops after the batch in flight and keeps what is answered"


def evaluate(request: Request) -> int:
    """Evaluate every model of the request; returns the exit status, 0 also after a request to stop. Collective."""
    activity.restart()
    signals = StopSignals(
        begun=lambda: activity.phase() != "start", told=lambda: _tell("interrupted"), announcement=ANNOUNCEMENT
    )
    with signals, ExitStack() as closing:
        with report_at_once():
            session = EvaluationSession(subjects(request)[0], closing, signals)
        try:
            with report_at_once():
                found = session.on_root(lambda: subjects(request))
                results = [evaluate_subject(session, subject, overwrite=request.overwrite) for subject in found]
                session.on_root(lambda: report([r for r in results if r is not None], found, request.out))
        except StopRequested as stop:
            if session.is_root:
                _tell(f"stopped {CAUSES[stop.cause]}")
    return 0


def _tell(how: str) -> None:
    if os.environ.get("RANK", "0") == "0" and not (how == "interrupted" and launcher_reports(os.environ)):
        print_line(f"{how}: what is answered is kept; to continue: {own_command()}", sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate on the ranks that torchrun started (one without it); returns the exit status."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    return as_rank(lambda: evaluate(read_request(arguments)))


if __name__ == "__main__":
    leave(main())

"""`asd-megatron evaluate WHAT [WHAT ...] [--sets NAME=DATA ...] [options] [--section.key value ...]`."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence

from asd_megatron.cli.guard import INTERRUPTED, importing
from asd_megatron.cli.launch import checked_placement, environment_of_ranks, refuse_other_launchers, run_ranks
from asd_megatron.cli.placement import placement_text
from asd_megatron.distributed.launch import set_defaults
from asd_megatron.distributed.launcher import COMMAND, end_with_launcher
from asd_megatron.run.evaluation_request import parser, read_request

MODULE = "asd_megatron.evaluate"


def main(argv: Sequence[str]) -> int:
    """Evaluate on the ranks that the layout needs; returns the exit status. With --plot nothing is started."""
    if any(word in ("-h", "--help") for word in argv):
        parser().print_help()
        return 0
    request = read_request(argv)
    command = shlex.join(["asd-megatron", "evaluate", *argv])
    if request.plot:
        with importing("interrupted"):
            from asd_megatron.run.evaluation_report import plot
        return plot(request)
    refuse_other_launchers("evaluate", MODULE, os.environ)
    end_with_launcher(os.environ)
    print("asd-megatron evaluate: importing PyTorch and Megatron-Core takes some seconds", flush=True)
    with importing(f"interrupted before the evaluation began: nothing is lost; to start it: {command}"):
        from asd_megatron.run.subjects import subjects

        found = subjects(request)
        placements = [checked_placement(subject.recipe) for subject in found]
    recipe, placement = found[0].recipe, placements[0]
    print(placement_text(recipe, placement), flush=True)
    with environment_of_ranks():
        placement.apply(os.environ)
        set_defaults(placement.ranks, os.environ)
        os.environ[COMMAND] = command
        try:
            status = run_ranks(MODULE, argv, placement.ranks)
        except KeyboardInterrupt:
            status = INTERRUPTED
    if status > 128:
        print(f"ended: what is answered is kept; to continue: {command}", file=sys.stderr, flush=True)
    return status

"""`asd-megatron train` whose ranks are `sabotage`: `python -m asd_megatron.checks.drill.launcher RECIPE ...`."""

from __future__ import annotations

import sys

from asd_megatron.cli.guard import guarded
from asd_megatron.cli.launch import launch_recipe

RANKS = "asd_megatron.checks.drill.sabotage"

if __name__ == "__main__":
    sys.exit(guarded(lambda: launch_recipe("train", RANKS, sys.argv[1:])))

"""Kill a run of two CPU ranks at random moments, start the same command each time, and compare its end with a run that
nobody killed: weights, moments and metrics, bit for bit.

    python tools/kill_points.py [--kills 200] [--layout tp2 | dp2] [--json FILE]

The moments are uniform from halfway to the first step of a start to as long after it, so they lie in the start, in any
phase of a step, and in the writing of checkpoints and metrics. Every second kill is of one rank alone; the other ends
by itself, or it is ended some seconds later, as a launcher does it. The ranks are forked from a server that has
imported the program: 200 kills take some twenty minutes on two quiet cores.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault("OMP_NUM_THREADS", "1")

from tqdm import tqdm

from asd_megatron.checks.drill.world import Sections, World, newest, weights_equal
from asd_megatron.checks.ranks import CheckError
from asd_megatron.files import write_json
from asd_megatron.observe.writer import read_metrics
from asd_megatron.run.folder import CHECKPOINTS

RANKS = 2
FROM, TO = 0.5, 2.0  # the moments, in units of the time from a start to its first step
END_SECONDS = 12.0  # until a rank whose neighbour was killed is killed too, as a launcher does
RUN_SECONDS = 3600.0
STEPS_PER_KILL = 10
LAYOUTS: dict[str, Sections] = {"tp2": {}, "dp2": {"parallelism": {"data": 2, "distributed_optimizer": True}}}
COMMON: Sections = {"checkpoint": {"every": 2, "keep": 2, "export_at_end": False}}


def main(argv: Sequence[str]) -> int:
    """Returns 1 when the runs end differently."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="how many (default: %(default)s)")
    parser.add_argument("--layout", choices=tuple(LAYOUTS), default="tp2", help="dp2: with the distributed optimizer")
    parser.add_argument("--seed", type=int, default=1, help="of the moments (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the summary to FILE")
    arguments = parser.parse_args(argv)
    with TemporaryDirectory(prefix="asd_megatron_kills_") as folder:
        summary = kill_points(World(Path(folder)), arguments.layout, arguments.kills, arguments.seed)
    print(", ".join(f"{name} {value}" for name, value in summary.items()))
    if arguments.json is not None:
        write_json(arguments.json, summary)
    return 0 if summary["equal"] else 1


def kill_points(world: World, layout: str, kills: int, seed: int) -> dict[str, object]:
    """The run is long enough for all kills; after the last one it goes on to its end."""
    steps, rng = STEPS_PER_KILL * kills, random.Random(seed)
    sections: Sections = {**COMMON, **LAYOUTS[layout], "run": {"steps": steps}}
    straight = world.recipe("straight", layout, sections)
    recipe, run = world.recipe("killed", layout, sections), world.run_folder("killed")
    first = finish(straight, world.run_folder("straight"), RUN_SECONDS)
    done, begun, where, ended_by_itself = 0, time.monotonic(), Counter[str](), 0
    with tqdm(total=kills, unit="kill") as bar:
        while done < kills and newest(run) < steps:
            ranks = start(recipe)
            time.sleep(rng.uniform(FROM * first, TO * first))
            where[_state(run)] += 1
            victims = ranks if done % 2 else [rng.choice(ranks)]
            for rank in victims:
                if rank.pid is not None and rank.exitcode is None:
                    os.kill(rank.pid, signal.SIGKILL)
            ended_by_itself += join(ranks, END_SECONDS) - len(victims)
            done += 1
            bar.update(1)
    finish(recipe, run, RUN_SECONDS)
    equal = weights_equal(run, world.run_folder("straight"))
    return {
        "layout": layout,
        "kills": done,
        "steps": steps,
        "equal": equal,
        "ranks that ended by themselves": ended_by_itself,
        **{f"killed {state}": count for state, count in sorted(where.items())},
        "seconds": round(time.monotonic() - begun),
    }


def _state(run: Path) -> str:
    """What the run's folder tells of the moment."""
    if not (run / "recipe.yaml").exists():
        return "before the first start was complete"
    if any(path.name.startswith(".step_") for path in (run / CHECKPOINTS).glob(".step_*")):
        return "while a checkpoint was written"
    return "at another moment"


def start(recipe: Path) -> list[BaseProcess]:
    """The ranks of a run, forked from a server that has imported the program."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["asd_megatron.train"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = recipe.with_suffix(".log")
    ranks = [context.Process(target=_rank, args=(rank, port, str(recipe), str(log))) for rank in range(RANKS)]
    for rank in ranks:
        rank.start()
    return list(ranks)


def _rank(rank: int, port: int, recipe: str, log: str) -> None:
    from asd_megatron import train
    from asd_megatron.cli.guard import leave

    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS, "MASTER_PORT": port}
    os.environ.update({name: str(number) for name, number in numbers.items()}, MASTER_ADDR="127.0.0.1")
    leave(train.main([recipe]))


def finish(recipe: Path, run: Path, seconds: float) -> float:
    """Run to the end; returns the seconds from the start to the first step's metrics."""
    ranks, begun = start(recipe), time.time()
    join(ranks, seconds)
    statuses = [rank.exitcode for rank in ranks]
    if statuses != [0] * RANKS:
        raise CheckError(f"the ranks ended with {statuses}: {recipe.with_suffix('.log').read_text()[-2000:]}")
    first = datetime.fromisoformat(read_metrics(run)[0]["time_utc"])
    return max(1.0, first.timestamp() - begun)


def join(ranks: Sequence[BaseProcess], seconds: float) -> int:
    """Wait so long for the ranks to end, then kill those that have not; returns how many have."""
    end = time.monotonic() + seconds
    for rank in ranks:
        rank.join(max(0.0, end - time.monotonic()))
    late = [rank for rank in ranks if rank.exitcode is None]
    for rank in late:
        rank.kill()
        rank.join()
    return len(ranks) - len(late)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

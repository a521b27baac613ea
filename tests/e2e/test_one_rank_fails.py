"""One rank of two fails in a phase of the step: the run ends within seconds, and the cause is what is said first.

One process, with the program imported, forks the two ranks of each case; it ends the rank that is left as torchrun
does when another has failed.
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import forkserver
from tests.e2e.forked import LIMIT, fork_ranks, prepare, wait
from tests.e2e.world import World

PHASES = (
    "collect",
    "build_batch",
    "score_teacher",
    "score_student",
    "gate_step",
    "update",
    "observe",
    "checkpoint",
    "export",
)
CAUSE = "the cause of it all"


@pytest.fixture(scope="module")
def endings(world: World) -> dict[tuple[str, int], tuple[list[int], float, str]]:
    """By phase and failing rank: the exit statuses, the seconds from the failure to the end, what was printed."""
    recipe = world.recipe(
        "two_ranks.yaml",
        parallelism={"data": 2},
        algorithm={"name": "antisd", "updates_per_batch": 2},
        checkpoint={"every": 1, "export_every": 1},
    )
    # Half of the cases with the failure on rank 0, the other half on rank 1; both for what rank 0 does alone.
    alone = [(phase, rank) for rank in (0, 1) for phase in ("observe", "checkpoint", "export")]
    cases = [(phase, n % 2) for n, phase in enumerate(PHASES) if (phase, 0) not in alone] + alone
    with forkserver().Pool(1) as pool:
        found = pool.apply(_endings, (cases, str(recipe), str(world.folder)))
    return dict(zip(cases, found, strict=True))


@pytest.mark.timeout(300)
def test_the_run_ends_soon_and_says_why(endings: dict[tuple[str, int], tuple[list[int], float, str]]) -> None:
    for case, (statuses, seconds, printed) in endings.items():
        assert seconds < LIMIT, (case, seconds, printed)
        assert statuses[case[1]] > 0 and 0 not in statuses, (case, statuses, printed)
        errors = [line for line in printed.splitlines() if re.match(r"(error|\w*Error)\b", line)]
        assert errors and CAUSE in errors[0], (case, printed)


def _endings(cases: list[tuple[str, int]], recipe: str, folder: str) -> list[tuple[list[int], float, str]]:
    from asd_megatron.distributed import first_error

    prepare()
    first_error.HEAD_START = 0.5  # rank 0 has failed already when the other does because of it
    return [_ending(phase, rank, recipe, Path(folder) / f"{phase}_{rank}") for phase, rank in cases]


def _ending(phase: str, failing: int, recipe: str, files: Path) -> tuple[list[int], float, str]:
    failed, output = files.with_suffix(".failed"), files.with_suffix(".txt")

    def before(rank: int) -> None:
        if rank == failing:
            _make_fail(phase, failed)

    statuses = wait(fork_ranks([recipe, "--run.name", files.name], output, 2, before))
    seconds = time.time() - float(failed.read_text()) if failed.exists() else float("inf")
    return statuses, seconds, output.read_text()


def _make_fail(phase: str, failed: Path) -> None:
    """This rank raises inside the phase, beside what the other rank does in it."""
    from asd_megatron.checkpoint import training
    from asd_megatron.rollout.embedded.engine import EmbeddedEngine
    from asd_megatron.run import rl, session
    from asd_megatron.trainer import passes
    from asd_megatron.trainer.local_batch import LocalBatch

    def fail(*_: Any, **__: Any) -> None:
        failed.write_text(str(time.time()))
        raise OSError(CAUSE)

    where: dict[str, tuple[Any, str]] = {
        "collect": (EmbeddedEngine, "collect"),
        "build_batch": (LocalBatch, "receive"),
        "score_teacher": (passes, "score_teacher"),
        "score_student": (passes, "score_student"),
        "gate_step": (passes, "gate_entropy"),
        "update": (rl, "update"),
        "observe": (rl, "gather_table"),
        "checkpoint": (training, "_parts"),
        "export": (session, "write_folder"),
    }
    setattr(*where[phase], fail)

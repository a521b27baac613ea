"""Signals at the ranks of a run, ranks that hang, and one rank of two that fails: exit statuses, how soon the run ends,
what the console says, what is kept.

One process, with the program imported, forks the ranks of every case.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import pytest

from asd_megatron.observe.writer import read_metrics
from tests.distributed.harness import forkserver
from tests.e2e.forked import LIMIT, fork_ranks, prepare, wait
from tests.e2e.world import World

SECONDS = 1.5  # time-outs of the phases
SIGNALLED = {"start": 2, "one_rank": 2, "twice": 1}  # ranks of each case
HANGING = {"scoring": (1, 2), "rollout": (0, 1)}  # by phase: the rank that hangs, of how many
BLOCKED = "update"  # the phase in which a rank's interpreter is blocked, so that no thread of Python's runs
BLOCKED_SECONDS = 4.0  # its time-out: a second until it blocks, and some beats that it then misses
FAILING = (
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
"""Places in a step where a rank raises beside what the other rank does there."""
ON_RANK_ZERO = ("observe", "checkpoint", "export")  # what rank 0 does there, it does alone
CAUSE = "the cause of it all"
Ending = tuple[list[int], float, str]


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with forkserver().Pool(1, prepare) as pool:
        yield pool


@pytest.fixture(scope="module")
def endings(world: World, pool: Pool) -> dict[str, Ending]:
    """By case: the exit statuses, seconds from the signal or hang to the end, what was printed."""
    settings: dict[str, Any] = {"run": {"steps": 3}, "algorithm": {"name": "antisd"}, "checkpoint": {"every": 1}}
    recipe = world.recipe("forked.yaml", **settings)
    return dict(pool.apply(_endings, (str(recipe), str(world.folder))))


@pytest.fixture(scope="module")
def failures(world: World, pool: Pool) -> dict[tuple[str, int], Ending]:
    """By place and failing rank: the exit statuses, the seconds from the failure to the end, what was printed."""
    recipe = world.recipe(
        "two_ranks.yaml",
        parallelism={"data": 2},
        algorithm={"name": "antisd", "updates_per_batch": 2},
        checkpoint={"every": 1, "export_every": 1},
    )
    # Half of the cases with the failure on rank 0, the other half on rank 1; both for what rank 0 does alone.
    alone = [(place, rank) for rank in (0, 1) for place in ON_RANK_ZERO]
    cases = [(place, n % 2) for n, place in enumerate(FAILING) if place not in ON_RANK_ZERO] + alone
    found = pool.apply(_failures, (cases, str(recipe), str(world.folder)))
    return dict(zip(cases, found, strict=True))


@pytest.mark.timeout(200)
def test_signals_at_ranks(world: World, endings: dict[str, Ending]) -> None:
    statuses, _, printed = endings["start"]  # at rank 0, while the model is loaded
    assert statuses[0] == 130 and statuses[1] in (130, 143), printed
    (line,) = re.findall("^interrupted.*", printed, re.MULTILINE)
    assert line.startswith("interrupted before the run began: nothing is lost, ")
    assert not world.run_folder("start").joinpath("history.jsonl").exists()

    statuses, _, printed = endings["one_rank"]  # SIGHUP at rank 1, in the update of step 2
    assert statuses == [0, 0], printed
    assert (
        f"stopped at step 2 after SIGHUP: state saved in {world.run_folder('one_rank')}/checkpoints/step_000002"
        in printed
    )
    assert [row["step"] for row in read_metrics(world.run_folder("one_rank"))] == [1, 2]

    statuses, seconds, printed = endings["twice"]  # Ctrl-C pressed twice, in a long update of step 2
    assert statuses == [130] and seconds < LIMIT, printed
    assert (
        "Ctrl-C: the run stops after the step in flight and saves its state; a second one ends it at once\n" in printed
    )
    assert (
        f"interrupted: the checkpoint of step 1 is kept ({world.run_folder('twice')}/checkpoints/step_000001)"
        in printed
    )


def test_the_run_ends_and_says_who_hangs_where(world: World, endings: dict[str, Ending]) -> None:
    for phase, (hanging, ranks) in HANGING.items():
        statuses, seconds, printed = endings[phase]
        assert statuses == [1] * ranks, (statuses, printed)
        assert seconds < SECONDS + LIMIT, (phase, seconds)
        (error,) = re.findall("^error.*", printed, re.MULTILINE)
        who = f"rank {hanging} on " if ranks > 1 else "the run hangs"
        assert error.startswith(f"error: {who}") and f"(run.timeout.{phase})" in error, error
        assert f"Last operation, in the phase {phase}: _hang in " in error
        for rank in range(ranks):
            log = world.run_folder(phase) / "logs" / f"rank_{rank}.log"
            text = log.read_text()
            assert "start (fresh) after step 0: " in text and "Python stacks of all threads" in text
            assert (" in _hang\n" in text) == (str(log) in error) == (rank == hanging), text


def test_a_blocked_interpreter_ends_with_its_stacks(world: World, endings: dict[str, Ending]) -> None:
    statuses, seconds, printed = endings[BLOCKED]
    error = "error: rank 1 on .* hangs: .*run.timeout.update.*its process gives no sign of life"
    assert statuses == [1, 1] and seconds < BLOCKED_SECONDS + LIMIT and re.search(error, printed), printed
    assert " in _hang\n" in (world.run_folder(BLOCKED) / "logs" / "rank_1.log").read_text()


@pytest.mark.timeout(300)
def test_one_rank_fails_and_the_run_ends_soon_and_says_why(failures: dict[tuple[str, int], Ending]) -> None:
    for case, (statuses, seconds, printed) in failures.items():
        assert seconds < LIMIT, (case, seconds, printed)
        assert statuses[case[1]] > 0 and 0 not in statuses, (case, statuses, printed)
        errors = [line for line in printed.splitlines() if re.match(r"(error|\w*Error)\b", line)]
        assert errors and CAUSE in errors[0], (case, printed)


def _endings(recipe: str, folder: str) -> dict[str, Ending]:
    from asd_megatron.distributed import first_error, lost_ranks

    first_error.HEAD_START = 0.5
    lost_ranks.BEAT_SECONDS, lost_ranks.LATER_SECONDS = 0.25, 2.0
    cases = SIGNALLED | {phase: ranks for phase, (_, ranks) in HANGING.items()} | {BLOCKED: 2}
    return {name: _ending(name, ranks, recipe, Path(folder)) for name, ranks in cases.items()}


def _ending(name: str, ranks: int, recipe: str, folder: Path) -> Ending:
    begun, output = folder / f"{name}.begun", folder / f"{name}.txt"

    def mark() -> None:
        begun.write_text(str(time.time()))

    def before(rank: int) -> None:
        if name in HANGING:
            if rank == HANGING[name][0]:
                _make_hang(name, mark)
        elif name == BLOCKED:
            if rank == 1:
                _make_hang(name, mark, _block)
        elif rank == (name == "one_rank"):
            _make_signalled(name, mark)

    seconds = dict.fromkeys(HANGING, SECONDS) | {BLOCKED: BLOCKED_SECONDS}
    limits = [word for phase, limit in seconds.items() for word in (f"--run.timeout.{phase}", str(limit))]
    layout = ["--parallelism.tensor", str(ranks), "--run.name", name]
    statuses = wait(fork_ranks([recipe, *layout, *([] if name in SIGNALLED else limits)], output, ranks, before))
    return statuses, time.time() - float(begun.read_text()), output.read_text()


def _make_hang(phase: str, mark: Callable[[], None], sleep: Callable[[float], None] = time.sleep) -> None:
    from asd_megatron.rollout.embedded.engine import EmbeddedEngine
    from asd_megatron.trainer import schedule

    def _hang(*_: Any, **__: Any) -> None:
        mark()
        sleep(10 * LIMIT)

    where: dict[str, tuple[Any, str]] = {
        "rollout": (EmbeddedEngine, "_prefill"),
        "scoring": (schedule, "forward"),
        "update": (schedule, "forward_backward"),
    }
    setattr(*where[phase], _hang)


def _block(seconds: float) -> None:
    """Lock a mutex twice, in native code that keeps the interpreter to itself; no signal ends that."""
    time.sleep(1.0)  # its report has come
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.PyDLL(None).pthread_mutex_lock(mutex)


def _make_signalled(name: str, mark: Callable[[], None]) -> None:
    """This rank gets signals while it loads the model, or in the second update."""
    from asd_megatron.run import model_session, rl

    where: dict[str, tuple[Any, str, signal.Signals]] = {
        "start": (model_session, "build_port", signal.SIGINT),
        "one_rank": (rl, "update", signal.SIGHUP),
        "twice": (rl, "update", signal.SIGINT),
    }
    module, function, number = where[name]
    original, calls = getattr(module, function), []

    def signalled(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == (1 if name == "start" else 2):
            mark()
            os.kill(os.getpid(), number)
            if name == "twice":
                threading.Timer(0.6, os.kill, (os.getpid(), number)).start()
            if name != "one_rank":
                time.sleep(10 * LIMIT)
        return original(*arguments, **options)

    setattr(module, function, signalled)


def _failures(cases: list[tuple[str, int]], recipe: str, folder: str) -> list[Ending]:
    from asd_megatron.distributed import first_error

    first_error.HEAD_START = 0.5  # rank 0 has failed already when the other does because of it
    return [_failure(place, rank, recipe, Path(folder) / f"{place}_{rank}") for place, rank in cases]


def _failure(place: str, failing: int, recipe: str, files: Path) -> Ending:
    failed, output = files.with_suffix(".failed"), files.with_suffix(".txt")

    def before(rank: int) -> None:
        if rank == failing:
            _make_fail(place, failed)

    statuses = wait(fork_ranks([recipe, "--run.name", files.name], output, 2, before))
    seconds = time.time() - float(failed.read_text()) if failed.exists() else float("inf")
    return statuses, seconds, output.read_text()


def _make_fail(place: str, failed: Path) -> None:
    """This rank raises at the place, beside what the other rank does there."""
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
    setattr(*where[place], fail)

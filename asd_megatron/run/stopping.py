"""Requests to stop a run between two steps: a signal at any rank, the file RUN/stop, the run's time limit.

    SIGUSR1, SIGTERM    at one rank or several; SIGINT (Ctrl-C) and SIGHUP too, unless they are ignored
    RUN/stop            written by `asd-megatron stop RUN`, removed when the run stops and when it starts
    run.time_limit      when a further step, and saving it, could take longer than is left

All ranks learn of a request at the same step, and while they wait for servers; the state of the last complete step is
saved. A further kind of request is one more entry of `CAUSES` and one more line of `Stopping._own`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, cast

import torch
import torch.distributed as dist

from asd_megatron.config import AnyRecipe
from asd_megatron.distributed.stop_signals import StopSignals
from asd_megatron.observe.lines import NO_ROOM
from asd_megatron.run import folder as folders
from asd_megatron.run.history import record
from asd_megatron.run.interruption import continuing, own_command

SLURM_END = "SLURM_JOB_END_TIME"  # seconds since 1970
MARGIN_SECONDS = 120.0
"""Left of `run.time_limit` for a first checkpoint and for closing, beside the longest step and checkpoint so far."""

Cause = Literal["time_limit", "stop_file", "SIGHUP", "SIGINT", "SIGTERM", "SIGUSR1"]
CAUSES: dict[Cause, str] = {
    "time_limit": "before run.time_limit",
    "stop_file": "because RUN/stop asks for it",
    "SIGHUP": "after SIGHUP",
    "SIGINT": "after Ctrl-C",
    "SIGTERM": "after SIGTERM",
    "SIGUSR1": "after SIGUSR1",
}
"""Every cause, the ones that count before others last, with its words in the closing line."""


class StopRequested(BaseException):
    """Not an error: the run stops after `step`, on every rank. No `except Exception` on its way is meant for it.

    step, outcome: set once the state has been dealt with; `outcome` says how.
    """

    def __init__(self, cause: Cause, step: int | None = None, outcome: str | None = None) -> None:
        super().__init__(cause)
        self.cause, self.step, self.outcome = cause, step, outcome


class Stopping:
    """The requests to stop one run, as every rank sees them.

    signals: those that this rank receives; None: none. save_seconds: of the longest checkpoint so far; asked for on
    global rank 0 alone.
    """

    def __init__(
        self,
        recipe: AnyRecipe,
        host: dist.ProcessGroup,
        signals: StopSignals | None,
        save_seconds: Callable[[], float],
    ) -> None:
        self._host, self._signals, self._save_seconds = host, signals, save_seconds
        self._last_step = recipe.run.steps
        self._file = recipe.run.path / folders.STOP_FILE
        self._deadline = deadline(recipe.run.time_limit, os.environ, time.time())
        self._longest = 0.0  # seconds of a step
        self._since = time.monotonic()  # the beginning of the step in flight
        self._finishing = False

    def begin(self) -> None:
        """The first step begins now: what came before it was none. Raises StopRequested on every rank when the run is
        asked to stop already. Collective."""
        self._since = time.monotonic()
        self.while_waiting()

    def after_step(self, step: int) -> Cause | None:
        """Why the run stops after `step`, which has just ended, the same on every rank; None: it continues, or only its
        end is left. Collective: one all-reduce of a number."""
        if step == self._last_step:
            return None
        now = time.monotonic()
        self._longest, self._since = max(self._longest, now - self._since), now
        return self._agreed(self._longest)

    def while_waiting(self) -> None:
        """Raise StopRequested on every rank when the run should stop although a step is in flight. Collective, as
        `after_step`."""
        cause = None if self._finishing else self._agreed(0.0)
        if cause is not None:
            raise StopRequested(cause)

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """Around the last evaluation: the run does not stop while it waits, because the end is all that is left."""
        self._finishing = True
        try:
            yield
        finally:
            self._finishing = False

    def _agreed(self, ahead: float) -> Cause | None:
        """The request that counts among those of all ranks; ahead: seconds before the state could be saved next."""
        causes = list(CAUSES)
        own = self._own(ahead)
        rank = torch.tensor(0 if own is None else 1 + causes.index(own))
        if self._host.size() > 1:
            dist.all_reduce(rank, dist.ReduceOp.MAX, group=self._host)
        return None if int(rank) == 0 else causes[int(rank) - 1]

    def _own(self, ahead: float) -> Cause | None:
        """This rank's request. Global rank 0 alone looks at the file and the clock."""
        if self._signals is not None and self._signals.received is not None:
            return cast(Cause, self._signals.received)
        if self._host.rank() != 0:
            return None
        if self._file.exists():
            return "stop_file"
        if self._deadline is not None:
            needed = ahead + self._save_seconds() + MARGIN_SECONDS
            return "time_limit" if time.time() + needed > self._deadline else None
        return None


def deadline(limit: float | Literal["slurm"] | None, environment: Mapping[str, str], now: float) -> float | None:
    """When a run that starts `now` has to have ended, both in seconds since 1970; None: never. limit:
    `run.time_limit`; `slurm` without SLURM_JOB_END_TIME in the environment is none."""
    if limit == "slurm":
        end = environment.get(SLURM_END, "")
        return float(end) if end.isdigit() else None
    return None if limit is None else now + 3600 * limit


def conclude(recipe: AnyRecipe, request: StopRequested, done: int, newest: Path | None) -> str:
    """Record in the run folder that the run has stopped; returns the line that says so. done: the step after which it
    had started. newest: the run's newest checkpoint. A full disk loses the record alone."""
    folder, step = recipe.run.path, done if request.step is None else request.step
    with folders.writing(folder):
        (folder / folders.STOP_FILE).unlink(missing_ok=True)
        checkpoint = None if newest is None else str(newest)
        try:
            record(folder, "stop", step, cause=request.cause, learned=step - done, checkpoint=checkpoint)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
    kept = request.outcome or ("nothing was learned yet" if newest is None else f"state saved in {newest}")
    again = continuing(recipe, own_command())
    kept += _too_short(request, step - done)
    return f"stopped at step {step} {CAUSES[request.cause]}: {kept}; continue with: {again}"


def _too_short(request: StopRequested, learned: int) -> str:
    """Advice where no step fitted into the time limit: the same command would do no more."""
    if request.cause != "time_limit" or learned:
        return ""
    return f" (no step fits: {MARGIN_SECONDS:.0f} s are left for saving, so give the run or its job more time)"

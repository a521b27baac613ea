"""A training program as the drill starts it: with a fault in its ranks or without, signalled, and bounded in time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from asd_megatron.checks.drill.sabotage import RELEASED, VARIABLE, Sabotage
from asd_megatron.checks.ranks import CheckError
from asd_megatron.distributed.launcher import runs
from asd_megatron.distributed.stop_signals import ranks_of

START_SECONDS = 240.0  # until a fault's moment has come, on a busy machine
END_SECONDS = 240.0
POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Ended:
    """How a program ended. output: all that it wrote. seconds: from the fault to the end of its last process."""

    status: int
    output: str
    seconds: float

    def lines(self, start: str) -> list[str]:
        """The lines on the console that begin so."""
        return [line for line in self.output.splitlines() if line.startswith(start)]

    @property
    def tail(self) -> str:
        return self.output[-2000:]


class Program:
    """`asd-megatron train ARGUMENTS` in a session of its own, with `sabotage` in its ranks; as a context, nothing of it
    outlives the block. `log`: what it writes."""

    def __init__(
        self,
        arguments: Sequence[str],
        log: Path,
        sabotage: Sabotage | None = None,
    ) -> None:
        variables = dict(os.environ) | {"OMP_NUM_THREADS": "1"}
        module = ["-m", "asd_megatron.cli.main", "train"]
        if sabotage is not None:
            variables[VARIABLE] = sabotage.to_json()
            module = ["-m", "asd_megatron.checks.drill.launcher"]
        self._sabotage, self._log = sabotage, log
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, *module, *arguments],
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._since = time.monotonic()
        self._ranks: set[int] = set()  # processes

    def __enter__(self) -> Program:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._find_ranks()
        self.process.kill()
        for rank in self._ranks:
            with suppress(ProcessLookupError):
                os.kill(rank, signal.SIGKILL)
        self.process.wait()

    def struck(self) -> None:
        """Wait until the fault's moment has come. Raises CheckError when the program ends before."""
        assert self._sabotage is not None
        self.until(Path(self._sabotage.marker).exists, "the fault's moment")
        self._find_ranks()
        self._since = time.monotonic()

    def until(self, happened: Callable[[], bool], what: str) -> None:
        """Wait for it. Raises CheckError when it does not come, or the program ends."""
        end = time.monotonic() + START_SECONDS
        while not happened():
            if self.process.poll() is not None or time.monotonic() > end:
                raise CheckError(f"{what} did not come; the program wrote: {self._text()[-2000:]}")
            time.sleep(POLL_SECONDS)

    def signal(self, number: signal.Signals, to: str = "launcher") -> None:
        """Send a signal to the `launcher`, or to the process `group` (as a terminal's Ctrl-C)."""
        self._since = time.monotonic()
        send = os.killpg if to == "group" else os.kill
        send(self.process.pid, number)

    def release(self) -> None:
        """Let a rank that waits go on."""
        assert self._sabotage is not None
        Path(self._sabotage.marker + RELEASED).touch()

    def ended(self, seconds: float = END_SECONDS) -> Ended:
        """Wait for the end of the launcher and of its ranks. Raises CheckError after `seconds`."""
        end = time.monotonic() + seconds
        while self.process.poll() is None or any(runs(rank) for rank in self._ranks):
            if time.monotonic() > end:
                raise CheckError(f"the program had not ended after {seconds:.0f} s; it wrote: {self._text()[-2000:]}")
            self._find_ranks()
            time.sleep(POLL_SECONDS)
        return Ended(self.process.returncode, self._text(), time.monotonic() - self._since)

    def _find_ranks(self) -> None:
        if self.process.poll() is None:
            self._ranks.update(ranks_of(self.process.pid))

    def _text(self) -> str:
        return self._log.read_text(errors="replace")

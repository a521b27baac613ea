"""Starting the ranks of a check, bounded in time."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from asd_megatron.errors import UserError

LAUNCHER_GRACE_SECONDS = 40  # torchrun gives its ranks 30
POLL_SECONDS = 0.2
REPORT = "cell "
"""How a line of a rank's output begins that its user wants to see."""


class CheckError(UserError):
    """A check failed to run."""


def run_module(
    ranks: int,
    module: str,
    arguments: Sequence[str],
    log: Path,
    *,
    timeout: float,
    what: str,
    say: Callable[[str], None] | None = None,
) -> None:
    """`python -m module arguments` on `ranks` local ranks, their output in `log`; its lines that begin with `REPORT` go
    to `say` meanwhile. Raises CheckError with the end of the output when they fail, or after `timeout` seconds. `what`
    names the work in messages."""
    from asd_megatron.distributed.launch import torchrun_command, worker_environment

    command = torchrun_command(ranks, module, arguments)
    end, said = time.monotonic() + timeout, 0
    with log.open("w") as out:
        process = subprocess.Popen(command, env=worker_environment(ranks), stdout=out, stderr=subprocess.STDOUT)
        try:
            code = None
            while code is None:
                if time.monotonic() > end:
                    raise CheckError(f"{what} did not finish within {timeout:.0f} s")
                try:
                    code = process.wait(POLL_SECONDS)
                except subprocess.TimeoutExpired:
                    code = None
                if say is not None:
                    said = _report(log, said, say)
        finally:
            end_process(process)
    if code:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-40:])
        raise CheckError(f"{what} failed on {ranks} ranks (exit {code}):\n{tail}")


def _report(log: Path, said: int, say: Callable[[str], None]) -> int:
    """Pass on the new complete lines of the log; returns how many there are in all."""
    lines = log.read_text(errors="replace").split("\n")[:-1]
    for line in lines[said:]:
        if line.startswith(REPORT):
            say(line)
    return len(lines)


def end_process(process: subprocess.Popen[bytes]) -> None:
    """Stop a launcher that still runs: SIGTERM first, so that it can end its ranks, SIGKILL after the grace time."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(LAUNCHER_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

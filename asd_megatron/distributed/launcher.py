"""Ends a rank when its launcher has died: it would otherwise continue training beside the next start."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

LAUNCHER = "ASD_MEGATRON_LAUNCHER"
"""Environment variable: the process id of who started this process and must outlive it."""
COMMAND = "ASD_MEGATRON_COMMAND"
"""Environment variable: the command line that the user started, for messages."""
POLL_SECONDS = 0.5


def launcher_reports(environment: Mapping[str, str]) -> bool:
    """Whether `asd-megatron` runs this process as one of several ranks: it then says what has become of the run, after
    they have ended. (A single rank has taken its place, or was started by another command, such as the quickstart.)"""
    return LAUNCHER in environment and int(environment.get("WORLD_SIZE", "1")) > 1


def end_with_launcher(environment: Mapping[str, str]) -> None:
    """End this process within a second of its launcher's death, however that came about (SIGKILL, memory that ran out).

    The launcher is the process named by `ASD_MEGATRON_LAUNCHER`, else the parent of a process that torchrun started.
    Without either (`python -m asd_megatron.train` by hand, perhaps under nohup) nothing is watched.

    A daemon thread looks at the parent: PR_SET_PDEATHSIG would follow the *thread* that started this process.
    """
    if LAUNCHER in environment:
        launcher = int(environment[LAUNCHER])
        if os.getppid() != launcher and runs(launcher):
            return  # the variable was inherited through another program: this process is not the launcher's own
    elif "TORCHELASTIC_RUN_ID" in environment:
        launcher = os.getppid()
    else:
        return
    name = f"rank {environment['RANK']}" if "RANK" in environment else "this process"
    speaks = environment.get("LOCAL_RANK", "0") == "0"
    threading.Thread(target=_watch, args=(launcher, name, speaks), name="launcher watch", daemon=True).start()


def _watch(launcher: int, name: str, speaks: bool) -> None:
    while os.getppid() == launcher:
        time.sleep(POLL_SECONDS)
    if speaks:
        with suppress(OSError):
            text = f"error: the launcher (process {launcher}) has ended, so {name} ends too\n"
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, text.encode())
    os._exit(1)


def runs(process: int) -> bool:
    """Whether there is such a process that is no zombie; False where /proc does not tell."""
    return _state(process) not in (b"", b"Z", b"X")


def is_stopped(process: int) -> bool:
    """Whether a process is stopped (Ctrl-Z, SIGSTOP, a debugger); False where /proc does not tell."""
    return _state(process) in (b"T", b"t")


def _state(process: int) -> bytes:
    """The letter of /proc/N/stat, empty where there is none."""
    try:
        return Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()[0]
    except OSError:
        return b""

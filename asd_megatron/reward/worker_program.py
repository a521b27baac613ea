"""A worker of `workers.py`, a program of its own: `python -P worker_program.py SETTINGS`.

SETTINGS is a JSON object: `judge`, the file whose `load(*arguments)` returns a function from a request (a JSON object)
to an answer (likewise); `arguments`; `cpu_seconds` and `memory_bytes`, limits of one answer and of the process (null:
none); `quiet`, whether logging is off and output limited; `path`, where modules are looked up (null: as usual).

It imports the standard library alone, so that it starts fast and cannot hurt the trainer. It prints a JSON line
`{"ready": true}`, then answers each line; what the judge raises, SystemExit included, is answered `{"error": REASON}`.
More processor time than `cpu_seconds` ends the process (SIGPROF, even inside native code); the parent bounds wall time.
Should the parent be gone, the process ends.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import resource
import select
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

MAX_STDERR_BYTES = 65_536


def main() -> None:
    """Answer requests until the parent closes the pipe."""
    settings = json.loads(sys.argv[1])
    requests = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    # what a library reads or prints must not meet requests and answers
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # the parent's to handle; Slurm sends them to all
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # when the machine runs out of memory, this process ends and not the trainer
    if settings["memory_bytes"] is not None:
        resource.setrlimit(resource.RLIMIT_AS, (settings["memory_bytes"],) * 2)
    if settings["quiet"]:
        logging.disable(logging.CRITICAL)
    if settings["path"] is not None:
        sys.path[:] = settings["path"]
    threading.Thread(target=_end_with_parent, args=(requests.fileno(),), daemon=True).start()
    judge = _load(settings["judge"], settings["arguments"])
    answers.write(b'{"ready": true}\n')
    own = os.getpid()
    for line in requests:
        if settings["cpu_seconds"] is not None:
            signal.setitimer(signal.ITIMER_PROF, settings["cpu_seconds"])
        answer: dict[str, Any]
        try:
            answer = judge(json.loads(line))
        except BaseException as e:  # reported, counted and logged by the parent
            answer = {"error": f"{type(e).__name__}: {e}"[:300]}
        if os.getpid() != own:
            os._exit(0)  # a child that the judge has forked: it must not answer, nor take requests
        if settings["cpu_seconds"] is not None:
            signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(json.dumps(answer).encode() + b"\n")
        if settings["quiet"] and os.fstat(2).st_size > MAX_STDERR_BYTES:
            os.ftruncate(2, 0)


def _end_with_parent(requests: int) -> None:
    """Wait until nobody can write requests any more."""
    poll = select.poll()
    poll.register(requests, 0)  # no events but the implied ones: hang-up and errors
    poll.poll()
    os._exit(1)


def _load(judge_file: str, arguments: list[str]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    spec = importlib.util.spec_from_file_location("judge", judge_file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load(*arguments)  # type: ignore[no-any-return]


if __name__ == "__main__":
    main()

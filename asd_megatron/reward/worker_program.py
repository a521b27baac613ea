"""A worker of `workers.py`, a program of its own: `python -P worker_program.py JUDGE.py ALARM_SECONDS MEMORY_BYTES`.

It imports the standard library alone, so that it starts fast and cannot hurt the trainer, and JUDGE.py, whose
`load()` returns a function from a request (a JSON object) to an answer (likewise). It prints a JSON line
`{"ready": true}`, then answers each line; what the judge raises is answered `{"error": REASON}`. The parent bounds the
time of an answer; should the parent be gone, the alarm's default action ends the process even inside native code.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

MAX_STDERR_BYTES = 65_536


def main() -> None:
    judge_file, alarm_seconds, memory_bytes = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # whatever a library prints must not reach the parent as an answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable(logging.CRITICAL)
    judge = _load(judge_file)
    answers.write(b'{"ready": true}\n')
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_REAL, alarm_seconds)
        answer: dict[str, Any]
        try:
            answer = judge(json.loads(line))
        except Exception as e:  # reported, counted and logged by the parent
            answer = {"error": f"{type(e).__name__}: {e}"[:300]}
        signal.setitimer(signal.ITIMER_REAL, 0)
        answers.write(json.dumps(answer).encode() + b"\n")
        if os.fstat(2).st_size > MAX_STDERR_BYTES:
            os.ftruncate(2, 0)


def _load(judge_file: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    spec = importlib.util.spec_from_file_location("judge", judge_file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load()  # type: ignore[no-any-return]


if __name__ == "__main__":
    main()

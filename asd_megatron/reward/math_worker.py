r"""The worker of `math.py`, a program of its own: `python -P math_worker.py ALARM_SECONDS MEMORY_BYTES`.

It imports the standard library and math_verify, nothing of ours, so that it starts fast and cannot hurt the trainer.
It prints a JSON line `{"ready": true}`, then answers each line `{"gold": LATEX, "text": TEXT}` with `{"equal": BOOL}`
or `{"error": REASON}`. The parent bounds the time of an answer; should the parent be gone, the alarm's default action
ends the process even inside native code.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
from typing import Any

MAX_STDERR_BYTES = 65_536


def main() -> None:
    alarm_seconds, memory_bytes = float(sys.argv[1]), int(sys.argv[2])
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # whatever a library prints must not reach the parent as an answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable(logging.CRITICAL)
    compare = load_compare()
    if not compare("\\boxed{\\frac{1}{2}}", "\\boxed{0.5}") or compare("\\boxed{1}", "\\boxed{2}"):
        raise SystemExit("math_verify does not know that 1/2 is 0.5 and 1 is not 2: the installation is broken")
    answers.write(b'{"ready": true}\n')
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_REAL, alarm_seconds)
        request = json.loads(line)
        answer: dict[str, Any]
        try:
            answer = {"equal": bool(compare(request["gold"], request["text"]))}
        except Exception as e:  # reported, counted and logged by the parent
            answer = {"error": f"{type(e).__name__}: {e}"[:300]}
        signal.setitimer(signal.ITIMER_REAL, 0)
        answers.write(json.dumps(answer).encode() + b"\n")
        if os.fstat(2).st_size > MAX_STDERR_BYTES:
            os.ftruncate(2, 0)


def load_compare() -> Any:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    configs = [LatexExtractionConfig(), ExprExtractionConfig()]

    def read(text: str) -> Any:
        # math_verify's own limits need SIGALRM and would hide behind a silent []; the parent's bound replaces them
        return parse(text, configs, parsing_timeout=None, raise_on_error=True)

    def compare(gold: str, text: str) -> bool:
        answer = read(text)
        return bool(answer) and verify(read(gold), answer, timeout_seconds=None, raise_on_error=True)

    return compare


if __name__ == "__main__":
    main()

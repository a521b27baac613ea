from __future__ import annotations

import sys
import time

import pytest

from asd_megatron.errors import UserError
from asd_megatron.reward import workers
from asd_megatron.reward.base import new_counters
from asd_megatron.reward.workers import WorkerPool

WORKER = """
import json, os, sys, time
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    what = json.loads(line)["do"]
    if what == "sleep": time.sleep(60)
    if what == "die": sys.stderr.write("out of luck\\n"); sys.stderr.flush(); os._exit(3)
    if what == "mute": sys.stdout.write('{"half":'); sys.stdout.flush(); time.sleep(60)
    print(json.dumps({"echo": what}), flush=True)
"""


def pool(size: int = 2, timeout: float = 1.0, code: str = WORKER) -> WorkerPool:
    return WorkerPool([sys.executable, "-S", "-c", code], size, timeout, new_counters())


def test_order_and_failures_of_every_kind() -> None:
    p = pool()
    try:
        start = time.monotonic()
        outcomes = p.run([{"do": x} for x in ("a", "sleep", "b", "die", "mute", "c", "d")])
        assert time.monotonic() - start < 20
        assert [o.answer and o.answer["echo"] for o in outcomes] == ["a", None, "b", None, None, "c", "d"]
        assert [o.failure for o in outcomes] == ["", "timeout", "", "error", "timeout", "", ""]
        assert "ended with status 3: out of luck" in outcomes[3].reason
        assert p.counters["restarts"] == 4  # two timeouts, and the deadly request was tried twice
        assert [o.answer for o in p.run([{"do": "e"}])] == [{"echo": "e"}]
    finally:
        p.close()


def test_workers_that_do_not_start() -> None:
    with pytest.raises(UserError, match="reward workers do not start. The last one: .*No module named 'absent'"):
        pool(code="import absent")
    with pytest.raises(UserError, match="cannot start a reward worker"):
        WorkerPool(["/none/python"], 1, 1.0, new_counters())


def test_a_worker_that_hangs_while_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "START_SECONDS", 0.3)
    with pytest.raises(UserError, match="do not start"):
        pool(code="import time; time.sleep(60)")


def test_workers_that_keep_dying(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "MAX_DEATHS_IN_A_ROW", 4)
    p = pool(size=1)
    try:
        with pytest.raises(
            UserError, match=r"4 reward workers in a row died .*out of luck. Is the machine out of memory"
        ):
            p.run([{"do": "die"}] * 5)
        # the deaths were not in a row here
        p._deaths = 0
        assert [o.failure for o in p.run([{"do": x} for x in ("die", "a", "die", "b")])] == ["error", "", "error", ""]
    finally:
        p.close()


def test_an_interrupted_run_leaves_no_busy_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    p = pool(size=1, timeout=60.0)
    try:
        real = WorkerPool._wait

        def interrupted(self: WorkerPool, *args: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(WorkerPool, "_wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            p.run([{"do": "sleep"}])
        monkeypatch.setattr(WorkerPool, "_wait", real)
        assert [o.answer for o in p.run([{"do": "a"}])] == [{"echo": "a"}]
    finally:
        p.close()

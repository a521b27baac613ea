from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from asd_megatron.distributed import activity
from asd_megatron.errors import UserError
from asd_megatron.reward import workers
from asd_megatron.reward.base import new_counters
from asd_megatron.reward.workers import Limits, WorkerPool, worker_command

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
    return WorkerPool([sys.executable, "-S", "-c", code], size, Limits(timeout), new_counters())


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


def test_waiting_for_an_answer_is_no_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    """Global rank 0 shows progress to the ranks' watch, while the limit on the answer bounds the wait."""
    monkeypatch.setattr(workers, "LOOK_SECONDS", 0.05)
    p = pool(size=1, timeout=0.5)
    marked: list[int] = []
    monkeypatch.setattr(activity, "mark", lambda: marked.append(1))
    try:
        assert p.run([{"do": "sleep"}])[0].failure == "timeout" and len(marked) > 5
    finally:
        p.close()


def test_workers_that_do_not_start() -> None:
    with pytest.raises(UserError, match="reward workers do not start. The last one: .*No module named 'absent'"):
        pool(code="import absent")
    with pytest.raises(UserError, match="cannot start a reward worker"):
        WorkerPool(["/none/python"], 1, Limits(1.0), new_counters())


def test_a_worker_that_hangs_while_it_starts() -> None:
    code = "import time; time.sleep(60)"
    with pytest.raises(UserError, match="do not start"):
        WorkerPool([sys.executable, "-S", "-c", code], 1, Limits(1.0, start_seconds=0.3), new_counters())


JUDGE = """
import os, select, subprocess, sys, time
def load(folder):
    def judge(request):
        what = request["do"]
        if what == "spin":
            while True: pass
        if what == "exit": sys.exit(0)
        if what == "write": os.write(4, b"nonsense\\n")  # the pipe of the answers
        if what == "read": return {"read": sys.stdin.read()}
        if what == "children":
            child = subprocess.Popen(["sleep", "600"])
            open(folder + "/child", "w").write(str(child.pid))
            time.sleep(600)
        print("noise")
        return {"echo": what}
    return judge
"""


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_judge_that_spins_exits_reads_or_leaves_children(tmp_path: Path) -> None:
    (tmp_path / "judge.py").write_text(JUDGE)
    limits = Limits(wall_seconds=20.0, cpu_seconds=0.2)
    p = WorkerPool(worker_command(tmp_path / "judge.py", limits, [str(tmp_path)]), 1, limits, new_counters())
    try:
        spin, left, read, wrote, echo = p.run([{"do": what} for what in ("spin", "exit", "read", "write", "a")])
        assert spin.failure == "timeout" and "processor time (reward.timeout_seconds)" in spin.reason
        assert left.error == "SystemExit: 0" and read.answer == {"read": ""} and echo.answer == {"echo": "a"}
        assert wrote.failure == "error" and p.counters["restarts"] == 3
        worker = p._workers[0]
        for number in (signal.SIGUSR1, signal.SIGTERM):  # Slurm sends them to every process of a job
            os.killpg(worker.process.pid, number)
        assert p.run([{"do": "b"}])[0].answer == {"echo": "b"} and p._workers[0] is worker
        worker.stdin.write(b'{"do": "children"}\n')
        child = tmp_path / "child"
        until(lambda: child.exists() and child.read_text().isdigit())
        worker.kill()
        state = Path(f"/proc/{child.read_text()}/stat")
        until(lambda: not state.exists() or state.read_text().split()[2] == "Z")  # Z: nobody has waited for it
    finally:
        p.close()


def test_a_busy_worker_ends_with_its_parent(tmp_path: Path) -> None:
    (tmp_path / "judge.py").write_text("import time\ndef load(): return lambda request: time.sleep(600)")
    worker = subprocess.Popen(
        worker_command(tmp_path / "judge.py", Limits(600.0)), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert worker.stdin is not None and worker.stdout is not None
    try:
        assert worker.stdout.readline() == b'{"ready": true}\n'
        worker.stdin.write(b"{}\n")
        worker.stdin.close()
        assert worker.wait(30) == 1
    finally:
        worker.kill()
        worker.stdout.close()


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

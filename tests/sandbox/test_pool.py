"""Sandboxes at work, what they share and what becomes of those that cannot start."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from asd_megatron.sandbox import launch, seccomp
from asd_megatron.sandbox.check import leftover_processes
from asd_megatron.sandbox.launch import Interpreter, Protections, SandboxError, SandboxLimits, find_interpreter
from asd_megatron.sandbox.pool import CallTest, SandboxPool, StatementsTest, Status, StdinTest, TestedProgram
from asd_megatron.sandbox.probe import usable_protections

LIMITS = SandboxLimits(cpu_seconds=5.0, wall_seconds=60.0, memory_bytes=256 << 20, processes=8)
NO_SANDBOX = Protections(False, False)


def pool(protections: Protections = Protections(), size: int = 2) -> SandboxPool:  # noqa: B008
    return SandboxPool(find_interpreter(), LIMITS, size=size, protections=protections)


@pytest.mark.parametrize("protections", [Protections(), NO_SANDBOX], ids=["sandbox", "unprotected"])
def test_results_come_in_order(protections: Protections) -> None:
    double = TestedProgram("print(2 * int(input()))", [StdinTest("1"), StdinTest("x"), StdinTest("3")])
    calls = TestedProgram("def f(x):\n    return x", [CallTest("f", (1,)), CallTest("g", ()), StatementsTest("f(2)")])
    results = pool(protections).run([double, calls, TestedProgram("", ())])
    assert [[r.status.value for r in done or ()] for done in results] == [
        ["finished", "failed", "finished"],
        ["finished", "failed", "finished"],
        [],
    ]
    assert results[0] is not None and [r.stdout for r in results[0]] == [b"2\n", b"", b"6\n"]
    assert "invalid literal for int()" in results[0][1].stderr
    assert results[1] is not None and results[1][0].verdict == (b'0 ["int", "0x1"]',)
    assert "the program defines no 'g'" in results[1][1].stderr
    assert leftover_processes() == []


def test_a_test_finds_nothing_of_the_one_before() -> None:
    program = """
import os
import tempfile
print(os.listdir("/tmp"), os.getpid() < 8)
open("/tmp/note", "w").write("for the next test")
if input() == "fork" and os.fork() == 0:
    while True: pass
"""
    [results] = pool().run([TestedProgram(program, [StdinTest("fork"), StdinTest("-"), StdinTest("-")])])
    assert results is not None
    assert [(r.status.value, r.stdout) for r in results] == [("finished", b"[] True\n")] * 3


def test_tests_that_nobody_wants_are_not_run() -> None:
    program = TestedProgram("print(input())", [StdinTest(str(i)) for i in range(50)])
    [results] = pool().run([program], lambda _, done: len(done) < 3)
    assert results is not None and [r.stdout for r in results] == [b"0\n", b"1\n", b"2\n"]


def test_a_program_runs_as_it_would_by_itself() -> None:
    program = """
from __future__ import annotations
import dataclasses, multiprocessing, subprocess, sys, tempfile
@dataclasses.dataclass
class Point:
    x: int
def square(x):
    return x * x
if __name__ == "__main__":
    with multiprocessing.Pool(2) as workers:
        print(workers.map(square, range(4)), Point(1))
    print(subprocess.run([sys.executable, "-c", "print(5)"], capture_output=True, text=True).stdout.strip())
    with tempfile.NamedTemporaryFile("w+") as f:
        f.write("text"); f.seek(0); print(f.read())
    print(sys.stdin.read(), len({"a", "b"}), file=sys.stdout)
    quit()
"""
    [results] = pool().run([TestedProgram(program, [StdinTest("rest é")])])
    assert results is not None and results[0].status is Status.FINISHED, results
    assert results[0].stdout.decode() == "[0, 1, 4, 9] Point(x=1)\n5\ntext\nrest é 2\n"


def test_interpreters(tmp_path: Path) -> None:
    with pytest.raises(SandboxError, match="is no Python interpreter that runs"):
        find_interpreter("/bin/false")
    with pytest.raises(SandboxError, match="holds your home folder"):
        launch._checked(Interpreter("/bin/python3", str(Path.home())))


def test_sandboxes_that_do_not_start() -> None:
    broken = SandboxPool(Interpreter("/usr/bin/absent", "/usr"), LIMITS)
    program = TestedProgram("", [StdinTest("")])
    assert broken.run([program]) == [None] and broken.restarts == 2
    assert "No such file" in broken.last_failure
    with pytest.raises(SandboxError, match="6 sandboxes in a row did not start. .*absent.*sandbox check"):
        broken.run([program] * 5)


@pytest.fixture
def fake_bwrap(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Puts a shell script in the place of bwrap; in a folder that the sandbox's user can reach."""

    def install(script: str) -> None:
        program = Path(folder, "bwrap")
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)

    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        yield install


def test_what_a_machine_lacks(fake_bwrap: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    interpreter = find_interpreter()
    assert usable_protections(interpreter) == (Protections(True, True), [])
    with monkeypatch.context() as patch:
        patch.setattr(seccomp, "supported", lambda: False)
        protections, [missing] = usable_protections(interpreter)
        assert protections == Protections(True, False) and missing.protection.startswith("seccomp filter")
        patch.setattr(launch, "sandbox_user", lambda: None)
        if os.geteuid() == 0:  # root's processes are not limited
            assert [m.protection.split(":")[0] for m in usable_protections(interpreter)[1]] == [
                "seccomp filter",
                "limit on processes",
            ]
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "/nowhere")
        protections, [missing] = usable_protections(interpreter)
        assert protections == NO_SANDBOX and "no bwrap" in missing.protection and "apt-get" in missing.remedy
    fake_bwrap("echo bubblewrap 0.4.1")
    assert "bwrap 0.4.1" in usable_protections(interpreter)[1][0].protection
    fake_bwrap('[ "$1" = --version ] && echo bubblewrap 0.9.0 && exit; echo "bwrap: no permission" >&2; exit 1')
    protections, [missing] = usable_protections(interpreter)
    assert protections == NO_SANDBOX and "bwrap: no permission" in missing.protection
    assert "user.max_user_namespaces" in missing.remedy

"""tools/gpu_checks.py on a machine without a GPU, and its runner with rows that fail, hang and are interrupted."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from tests.te_double import stand_in

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import gpu_checks
from gpu import figures, machine, running
from gpu.machine import Machine, Needs
from gpu.rows import REPORT, ROWS, Row

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "gpu_checks.py"
HERE = Machine(2, "GPU", 80.0, "9.0", problems={"apex": "it is broken"})


def row(name: str, program: str, *, needs: Needs = Needs(), seconds: float = 60.0, **more: Any) -> Row:  # noqa: B008
    """A row that runs `program` with the report's path as its argument; figures are those of an update's report."""
    return Row(name, name, needs, ("-c", program, REPORT), seconds, **{"read": figures.of_update, **more})


WRITES = 'import sys, pathlib; pathlib.Path(sys.argv[1]).write_text(\'{"figures": {"error": 1.5e-3}}\')'
GOOD = row("good", WRITES)
SILENT = row("silent", "print('nothing')")
BAD = row("bad", "print('why it failed'); raise SystemExit(3)")
HANGS = row(
    "hangs",
    "import subprocess, sys, time\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import signal, time; signal.signal(2, 1); time.sleep(100)'])\n"
    "print(child.pid, flush=True)\ntime.sleep(100)",
    seconds=2.0,
)
NO_APEX = row("no_apex", WRITES, needs=Needs(others=("apex",)))
MANY_GPUS = row("many_gpus", WRITES, needs=Needs(4))


def options(**changed: Any) -> Namespace:
    return Namespace(**{"time_limit": None, "keep_going": True, "json": None, "require_all": False, **changed})


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "zombie" not in Path(f"/proc/{pid}/status").read_text()


# ---------------------------------------------------------------- this machine


def test_on_a_machine_without_a_gpu(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [sys.executable, str(TOOL), "--json", str(report), "--logs", str(tmp_path / "logs")]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    written = json.loads(report.read_text())
    assert [entry["name"] for entry in written["rows"]] == [row.name for row in ROWS]
    assert {entry["result"] for entry in written["rows"]} == {"not runnable"}
    assert all("no CUDA device is visible" in entry["reason"] for entry in written["rows"])
    assert written["machine"]["gpus"] == 0 and "torch" in written["machine"]["versions"]
    for name in (row.name for row in ROWS):
        assert re.search(rf"^{name} +\| .*not runnable: no CUDA", done.stdout, re.MULTILINE), name
    assert f"{len(ROWS)} not runnable" in done.stdout


def test_a_probe_that_fails_is_a_machine_without_cuda(tmp_path: Path) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'libcuda is broken' >&2\nexit 1\n")
    broken.chmod(0o755)
    assert "libcuda is broken" in str(machine.probe(str(broken)).missing(Needs()))
    broken.write_text("#!/bin/sh\nsleep 30\n")
    assert "within 1 s" in str(machine.probe(str(broken), seconds=1.0).missing(Needs()))


# ---------------------------------------------------------------- rows


def test_needs() -> None:
    assert HERE.missing(Needs(2, 80.0, ("cuda", "pytest", "transformer_engine"))) is None
    assert "4 GPUs" in str(HERE.missing(Needs(4)))
    assert "90 GiB" in str(HERE.missing(Needs(memory_gib=90)))
    assert HERE.missing(Needs(others=("apex",))) == "Apex: it is broken"
    assert str(Needs(2, 30, ("cuda", "sglang"))) == "2 GPUs of 30 GiB, SGLang's environment"


def test_results_table_and_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report.json"
    rows = [GOOD, NO_APEX, BAD, SILENT, MANY_GPUS, HANGS]
    assert gpu_checks.check(rows, HERE, tmp_path, options(json=report)) == 1
    out, err = capsys.readouterr()
    results = {entry["name"]: entry for entry in json.loads(report.read_text())["rows"]}
    assert {name: entry["result"] for name, entry in results.items()} == {
        "good": "ok",
        "no_apex": "not runnable",
        "bad": "FAILED",
        "silent": "FAILED",
        "many_gpus": "not runnable",
        "hangs": "FAILED",
    }
    assert results["good"]["figures"] == {"error": 1.5e-3} and results["hangs"]["seconds"] >= 2
    assert results["bad"]["reason"] == "exit status 3" and "within 2 s" in results["hangs"]["reason"]
    assert "    why it failed" in err and str(tmp_path / "bad.log") in err
    lines = {line.split(" | ")[0].strip(): line for line in out.splitlines() if " | " in line}
    assert lines["good"].endswith("error 0.0015") and "Apex: it is broken" in lines["no_apex"]
    assert "1 ok, 3 FAILED, 2 not runnable, 0 not run" in out
    child = int((tmp_path / "hangs.log").read_text().split()[0])
    assert not alive(child), "a row's processes end with it"


@pytest.mark.parametrize(
    ("rows", "changed", "status", "results"),
    [
        ([GOOD, NO_APEX], {}, 0, ["ok", "not runnable"]),
        ([GOOD, NO_APEX], {"require_all": True}, 1, ["ok", "not runnable"]),
        ([BAD, GOOD], {"keep_going": False}, 1, ["FAILED", "not run"]),
        ([GOOD, NO_APEX], {"time_limit": -1.0}, 1, ["not run", "not runnable"]),
    ],
)
def test_options(tmp_path: Path, rows: list[Row], changed: dict[str, Any], status: int, results: list[str]) -> None:
    report = tmp_path / "report.json"
    assert gpu_checks.check(rows, HERE, tmp_path, options(json=report, **changed)) == status
    assert [entry["result"] for entry in json.loads(report.read_text())["rows"]] == results


def test_an_interruption_ends_the_row_and_prints_the_table(tmp_path: Path) -> None:
    """By a scheduler's signal, which the tool treats as Ctrl-C."""
    program = (
        "import gpu_checks; from gpu.rows import ROWS; from tests.tools.test_gpu_checks import *\n"
        "gpu_checks.probe = lambda: HERE\n"
        "gpu_checks.ROWS = (GOOD, row('hangs', HANGS.command[1]), BAD)\n"
        f"sys.exit(gpu_checks.main(['--logs', {str(tmp_path)!r}]))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TOOL.parent), str(ROOT)])}
    process = subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    log, end = tmp_path / "hangs.log", time.monotonic() + 60
    while not (log.exists() and log.read_text().endswith("\n")) and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert re.search(r"^good .*\| ok ", out, re.MULTILINE)
    assert len(re.findall(r"^(?:hangs|bad) .*not run: interrupted", out, re.MULTILINE)) == 2
    assert not alive(int(log.read_text().split()[0]))


def test_paths_are_refused_before_the_first_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_checks, "probe", lambda: pytest.fail("probed"))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    file = tmp_path / "file"
    file.touch()
    assert gpu_checks.main(["--logs", str(file)]) == 2
    assert gpu_checks.main(["--logs", str(tmp_path), "--json", str(file / "report.json")]) == 2


def test_an_interruption_of_the_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_checks, "probe", interrupted)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert gpu_checks.main(["--logs", str(tmp_path)]) == 130


def test_a_row_sees_as_many_gpus_as_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        "import json, os, sys\n"
        "json.dump({'figures': {n: os.environ[n] for n in ('CUDA_VISIBLE_DEVICES', 'SWITCH')}}, open(sys.argv[1], 'w'))"
    )
    shown = row("shown", program, environment={"SWITCH": "on"})
    for named, seen in ((None, "0"), ("5,7", "5")):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if named is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
        (outcome,) = running.Runner(HERE, tmp_path, lambda _: None).run([shown])
        assert outcome.values == {"CUDA_VISIBLE_DEVICES": seen, "SWITCH": "on"}


def test_a_row_of_the_checkout_runs(tmp_path: Path) -> None:
    """Its command, tests with the marker `gpu` and their figures; Transformer Engine is the stand-in."""
    with stand_in():
        (outcome,) = running.Runner(HERE, tmp_path, lambda _: None).run(gpu_checks.select(["te_signatures"], ROWS))
    assert outcome.result == "ok", running.tail(tmp_path / "te_signatures.log")
    assert outcome.values["passed"] == 1 and outcome.values["release"] == 2.11 and outcome.values["compared"] > 20


# ---------------------------------------------------------------- figures


def test_figures_of_tests(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "def test_a(record_property): record_property('error', 0.25)\n"
        "def test_b(): pytest.skip('two GPUs are needed')\n"
        "def test_c(): assert False\n"
    )

    def report(*names: str) -> figures.Figures:
        path = tmp_path / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={path}"]
        subprocess.run([*command, *(f"test_it.py::{name}" for name in names)], cwd=tmp_path, capture_output=True)
        return figures.of_tests(path)

    found = report("test_a", "test_b", "test_c")
    assert found.values == {"passed": 1, "failed": 1, "skipped": 1, "error": 0.25} and found.skipped is None
    assert report("test_b").skipped == "two GPUs are needed"


def test_figures_of_parity(tmp_path: Path) -> None:
    cell = {"layout": "tp2", "max_relative_error": 1e-6, "update_error": 2e-5}
    cells = [cell, {**cell, "layout": "pp2", "max_relative_error": None, "update_error": 3e-5}]
    (tmp_path / "parity.json").write_text(json.dumps({"cells": cells}))
    found = figures.of_parity(tmp_path / "parity.json").values
    assert found == {"layouts": 2, "largest error": "1.0e-06 (tp2)", "of updates": "3.0e-05 (pp2)"}


# ---------------------------------------------------------------- the rows of the checkout


def test_every_gpu_test_belongs_to_a_row() -> None:
    """And every row that gives tests to pytest selects some."""
    files = [str(p.relative_to(ROOT)) for p in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in p.read_text()]
    files.remove("tests/tools/test_gpu_checks.py")
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    nodes = [line for line in done.stdout.splitlines() if "::" in line]
    assert done.returncode == 0 and nodes, done.stdout[-2000:]
    rows = {row.name: row for row in ROWS if row.tests}
    chosen = {name: {n for n in nodes if any(_selects(t, n) for t in row.tests)} for name, row in rows.items()}
    assert sorted(set(nodes) - set().union(*chosen.values())) == []
    assert all(chosen.values()) and not any(row.absent() for row in rows.values())
    assert len(ROWS) == len({row.name for row in ROWS})


def _selects(test: str, node: str) -> bool:
    return node == test or node.startswith((f"{test}::", f"{test}[", f"{test}/"))


def test_commands_of_rows_exist(capsys: pytest.CaptureFixture[str]) -> None:
    """Their programs take the options that rows give them."""
    for row in ROWS:
        if row.tests or row.command[0] != "-m":
            continue
        module = row.command[1]
        assert (ROOT / f"{module.replace('.', '/')}.py").exists()
    assert gpu_checks.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(row.name in listed and row.shows in listed for row in ROWS)
    assert gpu_checks.main(["--only", "none"]) == 2 and "--list" in capsys.readouterr().err


def test_what_a_container_is_given() -> None:
    """All that the package needs but what the container has to keep, and what tests import."""
    lines = (ROOT / "tools" / "gpu" / "requirements.txt").read_text().splitlines()
    given = {line for line in lines if line and not line.startswith("#")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {re.split(r"[^\w-]", text)[0] for text in project["dependencies"]}
    assert given == needed - {"torch", "triton"} | {"hypothesis", "nvidia-ml-py", "pytest", "pytest-timeout"}

"""A shipped script on a real Slurm cluster: signalled, queued again, resumed, completed."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from asd_megatron.cli.main import main
from asd_megatron.run.history import read_history
from tests.e2e.world import ROOT, metrics, start, steps
from tests.slurm.cluster import Cluster, cluster

SCRIPT = ROOT / "examples" / "slurm" / "cpu_two_nodes.sbatch"
pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("slurm"), ["n1", "n2", "n3", "n4"]) as made:
        made.environment.update(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), NO_COLOR="1", PYTHONWARNINGS="ignore")
        yield made


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder from which the shipped scripts can be submitted."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/bash\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return tmp_path


def until(condition: Callable[[], bool], slurm: Cluster, job: str, log: Path, seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        failed = slurm.state(job).startswith(("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"))
        assert time.monotonic() < deadline and not failed, log.read_text() if log.exists() else "no log"
        time.sleep(0.3)


def done(run: Path) -> list[int]:
    return steps(run) if (run / "metrics.jsonl").exists() else []


def test_a_job_is_signalled_queued_again_and_completes(slurm: Cluster, clone: Path) -> None:
    job = slurm.call("sbatch", "--parsable", str(SCRIPT), cwd=clone).strip()
    run, log = clone / "runs" / "slurm-puzzle", clone / f"slurm-puzzle-{job}.out"
    until(lambda: len(done(run)) > 6, slurm, job, log)
    slurm.call("scancel", "--signal=USR1", job)  # what --signal=USR1@300 does, 300 seconds before the limit
    until(lambda: slurm.state(job) == "PENDING BeginTime", slurm, job, log)  # two minutes
    stopped = read_history(run)[-1]
    assert stopped["cause"] == "SIGUSR1" and not (run / "summary.json").exists()
    assert (run / "checkpoints" / f"step_{stopped['step']:06d}").is_dir()
    slurm.call("scontrol", "update", f"JobId={job}", "StartTime=now+5")  # nodes revoke the first start's credential
    until((run / "summary.json").exists, slurm, job, log)
    until(lambda: slurm.state(job).startswith("COMPLETED"), slurm, job, log)
    text = log.read_text()
    print(text)
    assert f"stopped at step {stopped['step']} after SIGUSR1: state saved in" in text
    assert [event["event"] for event in read_history(run)] == ["fresh", "stop", "resume", "end"]

    words = SCRIPT.read_text().split("-m asd_megatron.train ")[1].split("\n)")[0].split()
    alone = start("asd_megatron.cli.main", "train", *words, "--run.name", "alone", cwd=clone, timeout=240)
    assert alone.returncode == 0, alone.stderr
    assert steps(run) == list(range(25))
    assert metrics(run) == metrics(clone / "runs" / "alone")


def test_a_job_is_submitted_asked_to_stop_and_not_queued_again(
    slurm: Cluster, clone: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """One node, whose ranks `asd-megatron train` starts."""
    monkeypatch.chdir(clone)
    for name, value in slurm.environment.items():
        monkeypatch.setenv(name, value)
    options = ["--gpus-per-node", "0", "--time", "30", "--python", ".venv/bin/python", "--submit"]
    recipe = ["examples/puzzle/quickstart.yaml", "--run.name", "one", "--evaluation.at_start", "false"]
    assert main(["launch", "--slurm", *options, *recipe]) == 0
    job = capfd.readouterr().out.split()[-1]
    run, log = clone / "runs" / "one", clone / f"one-{job}.out"
    until(lambda: len(done(run)) > 1, slurm, job, log)
    assert main(["stop", str(run)]) == 0
    until(lambda: slurm.state(job).startswith("COMPLETED"), slurm, job, log)
    assert "because RUN/stop asks for it: state saved in" in log.read_text()
    assert read_history(run)[-1]["cause"] == "stop_file"

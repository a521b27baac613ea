"""Training over two nodes, with servers on one of them that the run starts; a cut network; a lost node; resumption."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from asd_megatron.observe.writer import read_metrics
from tests.cluster.namespaces import Cable, Node, two_nodes
from tests.e2e.world import ROOT, TORCHRUN, World, make_world, metrics
from tests.rollout.sglang.fake_environment import fake_python

pytestmark = [pytest.mark.netns, pytest.mark.timeout(600)]

STEPS = 8
LOST_SECONDS = 10
START_SECONDS = 150.0
END_SECONDS = LOST_SECONDS + 60.0  # from the loss to the end of both nodes' torchrun
NOTHING_LEFT_SECONDS = 30.0
PORT = 29500
SERVING = ("servers/", "weight_sync/", "rollouts/restored_", "rollouts/dropped_tokens")
"""Metrics about the servers and their responses in the bank, which a restart changes."""


@pytest.fixture(scope="module")
def nodes() -> Iterator[tuple[Node, Node, Cable]]:
    with two_nodes() as made:
        yield made


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("nodes"))


class Run:
    """The run `name`: a rank on each node, two servers on the second."""

    def __init__(self, world: World, name: str, nodes: tuple[Node, Node, Cable]) -> None:
        self.folder, self._nodes = world.run_folder(name), nodes[:2]
        self._logs = world.folder
        python = world.folder / "environment" / "python"
        if not python.exists():
            python = fake_python(world.folder / "environment")
            server = "from tests.cluster.training_server import main\nmain()\n"
            (python.parent / "sglang" / "launch_server.py").write_text(server)
            text = python.read_text().replace(f"PYTHONPATH={python.parent}", f"PYTHONPATH={python.parent}:{ROOT}")
            python.write_text(text)
        self.recipe = world.recipe(
            f"{name}.yaml",
            run={**world.sections()["run"], "name": name, "steps": STEPS, "lost_rank_timeout": LOST_SECONDS},
            parallelism={"data": 2},
            checkpoint={"every": 1},
            rollout={
                "engine": "sglang",
                "servers": 2,
                "server_hosts": [nodes[1].name],
                "server_launcher": "ip netns exec {host}",
                "server_python": str(python),
                "server_port": 28000,
                "verify_weights": False,  # the stand-ins compute no checksums
                "weight_sync_timeout": 20.0,
            },
        )

    def start(self) -> None:
        environment = {name: value for name, value in os.environ.items() if name not in TORCHRUN}
        environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        words = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
        words += ["--master-addr", self._nodes[0].address, "--master-port", str(PORT)]
        self._processes = []
        for rank, node in enumerate(self._nodes):
            log = self._logs / f"{self.folder.name}_{rank}.log"
            command = [*words, "--node-rank", str(rank), "-m", "asd_megatron.train", str(self.recipe)]
            self._processes.append(node.start(*command, log=log, environment=environment))

    def wait_for_step(self, step: int) -> None:
        self._wait(lambda: any(row["step"] >= step for row in self._rows()), START_SECONDS)

    def end(self, seconds: float) -> list[int]:
        """The exit statuses of both nodes' torchrun, within `seconds`."""
        deadline = time.monotonic() + seconds
        try:
            return [process.wait(max(0.0, deadline - time.monotonic())) for process in self._processes]
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {seconds:.0f} s:\n{self.said(0)}\n=====\n{self.said(1)}")

    def said(self, rank: int) -> str:
        return (self._logs / f"{self.folder.name}_{rank}.log").read_text(errors="replace")

    def _rows(self) -> list[dict[str, Any]]:
        return read_metrics(self.folder) if (self.folder / "metrics.jsonl").exists() else []

    def _wait(self, condition: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            ended = [process.poll() for process in self._processes]
            if time.monotonic() > deadline or ended != [None, None]:
                pytest.fail(f"exit statuses {ended}:\n{self.said(0)}\n=====\n{self.said(1)}")
            time.sleep(0.05)


def without_servers(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.startswith(SERVING)} for row in metrics(folder)]


def nothing_left(*nodes: Node) -> None:
    """Servers end some seconds after the run; their agents find the lease removed."""
    deadline = time.monotonic() + NOTHING_LEFT_SECONDS
    while any(node.pids() for node in nodes):
        assert time.monotonic() < deadline, [node.pids() for node in nodes]
        time.sleep(0.1)


def error(text: str) -> str:
    """What is reported as the cause."""
    lines = [line for line in text.splitlines() if line.startswith("error")]
    assert len(lines) == 1 and "failed:\nTraceback" not in text, text  # torchrun adds one of its own
    return lines[0]


def test_a_run_survives_a_cut_network_and_a_lost_node(world: World, nodes: tuple[Node, Node, Cable]) -> None:
    first, second, cable = nodes
    straight = Run(world, "straight", nodes)
    straight.start()
    assert straight.end(2 * START_SECONDS) == [0, 0], straight.said(0) + straight.said(1)
    expected = without_servers(straight.folder)
    assert [row["step"] for row in expected] == list(range(1, STEPS + 1))
    logs = [(straight.folder / "servers" / f"server_{k}.log").read_text() for k in (0, 1)]
    assert all(f"serving at {second.address}" in log for log in logs)
    nothing_left(first, second)
    assert not list((straight.folder / "servers").glob("*/task.json"))  # the keys

    run = Run(world, "interrupted", nodes)
    run.start()
    run.wait_for_step(2)
    cable.cut()
    assert 0 not in run.end(END_SECONDS)
    assert f"rank 1 on {os.uname().nodename} ({second.address}) is gone: no sign of life" in error(run.said(0))
    assert f"rank 0 on {os.uname().nodename} ({first.address}) is gone: its node has not" in error(run.said(1))
    nothing_left(first, second)
    cable.mend()

    run.start()
    run.wait_for_step(5)
    second.lose()
    assert 0 not in run.end(END_SECONDS)
    assert f"rank 1 on {os.uname().nodename} ({second.address}) is gone" in error(run.said(0))
    nothing_left(first, second)

    run.start()
    assert run.end(2 * START_SECONDS) == [0, 0], run.said(0) + run.said(1)
    assert without_servers(run.folder) == expected
    shutil.rmtree(run.folder)

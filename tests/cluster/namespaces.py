"""Two nodes on one machine: network namespaces joined by a cable (a veth pair). Needs root and iproute2.

Each has an address, a host name that its own /etc/hosts gives to that address, as on a cluster, and its own loopback;
files are shared. `cut` takes the cable away: packets vanish, no connection is closed. `lose` ends every process of a
node with SIGKILL: its connections are closed by the system.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

HOSTS = Path("/etc/netns")  # NAME/hosts: `ip netns exec NAME` shows it as /etc/hosts


@dataclass(frozen=True)
class Node:
    name: str  # also of its namespace and of its end of the cable
    address: str

    def command(self, *words: str) -> list[str]:
        return ["ip", "netns", "exec", self.name, *words]

    def start(self, *words: str, log: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """A process there, whose output goes to `log`."""
        with log.open("wb") as file:
            return subprocess.Popen(
                self.command(*words), stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=environment
            )

    def pids(self) -> list[int]:
        return [int(pid) for pid in _ip("netns", "pids", self.name).split()]

    def lose(self) -> None:
        """SIGKILL to everything there."""
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@dataclass(frozen=True)
class Cable:
    end: Node

    def cut(self) -> None:
        self._set("down")

    def mend(self) -> None:
        self._set("up")

    def _set(self, state: str) -> None:
        subprocess.run(self.end.command("ip", "link", "set", self.end.name, state), check=True)


@contextmanager
def two_nodes() -> Iterator[tuple[Node, Node, Cable]]:
    """Two nodes and their cable; what still runs there at the end is ended."""
    if os.getuid() or shutil.which("ip") is None:
        pytest.fail("network namespaces need root and iproute2 (`apt-get install iproute2`)", pytrace=False)
    nodes = [Node(f"n{k}x{os.getpid()}", f"10.77.0.{k}") for k in (1, 2)]
    try:
        for node in nodes:
            _ip("netns", "add", node.name)
        first, second = (node.name for node in nodes)
        _ip("link", "add", first, "netns", first, "type", "veth", "peer", "name", second, "netns", second)
        for node in nodes:
            _ip("-n", node.name, "address", "add", f"{node.address}/24", "dev", node.name)
            _ip("-n", node.name, "link", "set", node.name, "up")
            _ip("-n", node.name, "link", "set", "lo", "up")
            lines = ["127.0.0.1 localhost", f"{node.address} {socket.gethostname()}"]
            lines += [f"{other.address} {other.name}" for other in nodes]
            (HOSTS / node.name).mkdir(parents=True)
            (HOSTS / node.name / "hosts").write_text("\n".join(lines) + "\n")
        yield nodes[0], nodes[1], Cable(nodes[0])
    finally:
        for node in nodes:
            with suppress(subprocess.CalledProcessError):
                node.lose()
                _ip("netns", "delete", node.name)
            shutil.rmtree(HOSTS / node.name, ignore_errors=True)


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout

"""Servers whose processes run on other nodes, behind the interface of `ServerProcess`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from asd_megatron.rollout.sglang.servers.child import LEASE, LEASED, RENDEZVOUS, RENDEZVOUS_FOLDER
from asd_megatron.rollout.sglang.servers.hosts import Launcher
from asd_megatron.rollout.sglang.servers.options import (
    TRAINER_VARIABLES,
    ServerOptions,
    command,
    secret_arguments,
    server_variables,
    trainer_variables_removed,
    url_of,
)
from asd_megatron.rollout.sglang.servers.process import CHILD, HEALTH_SECONDS, ServerProcess

LEASE_SECONDS = 60.0
"""A server on another node ends after so many seconds without a sign of life from the run, when neither its launcher
nor the run's own end has reached it: the run's node, or the network between them, is lost."""


class RemoteProcess(ServerProcess):
    """The server of `options`, or its part on node `options.part`, on another node.

    The local process is the launcher's: that one's death is the server's. `folder`, new for each start, has the task of
    the agent with the keys, and the lease; it is removed at the end, whereupon the agent ends the server.
    """

    def __init__(self, name: str, options: ServerOptions, launcher: Launcher, *, log: Path) -> None:
        self._options, self._launcher = options, launcher
        super().__init__(
            name, command(options), url=url_of(options), log=log, environment=trainer_variables_removed(os.environ)
        )

    def _prepare(self) -> tuple[list[str], dict[str, str]]:
        options = self._options
        _, _, module, *arguments = self.command
        self._scratch = self._launcher.task_folder(self.log.stem)
        folder = Path(self._scratch.name)
        (folder / LEASE).touch()
        task = {
            "task": "serve",
            "python": str(options.python),
            "module": module,
            "arguments": arguments,
            "secret": secret_arguments(options),
            "variables": server_variables(options, os.environ, self._launcher.plugin),
            "not_passed": TRAINER_VARIABLES.pattern,
            "rendezvous": "" if options.meeting else RENDEZVOUS,
            "scratch_prefix": RENDEZVOUS_FOLDER,
            "address": options.host,
            "port": options.port,
            "lease": str(folder / LEASE),
            "lease_seconds": LEASE_SECONDS,
        }
        words = self._launcher.command(options.nodes[options.part], options.python, folder, task)
        return [sys.executable, str(CHILD), str(os.getpid()), LEASED, str(folder), *words], dict(self._environment)

    def stop(self, grace: float = 10.0) -> None:
        """As `ServerProcess.stop`. The agent, which finds its lease removed, needs no signal from the launcher."""
        if self._scratch is not None:
            self._scratch.cleanup()
        super().stop(grace)


class JointProcess:
    """One server whose ranks run on several nodes, a process on each: it lives while all of them do. The first part
    answers for it."""

    def __init__(self, parts: Sequence[RemoteProcess]) -> None:
        self.parts = list(parts)
        self.name, self.url, self.log = parts[0].name, parts[0].url, parts[0].log

    @property
    def pid(self) -> int | None:
        """The first part's, as `ServerProcess.pid`."""
        return self.parts[0].pid

    @property
    def alive(self) -> bool:
        return all(part.alive for part in self.parts)

    @property
    def status(self) -> str:
        return self._culprit().status

    @property
    def port_taken(self) -> bool:
        return any(part.port_taken for part in self.parts)

    def start(self) -> None:
        """Start every part; what is left of an earlier start is ended first."""
        self.stop(grace=0)
        for part in self.parts:
            part.start()

    def healthy(self, timeout: float = HEALTH_SECONDS) -> bool:
        return self.alive and self.parts[0].healthy(timeout)

    def stop(self, grace: float = 10.0) -> None:
        with ThreadPoolExecutor(len(self.parts)) as threads:
            list(threads.map(lambda part: part.stop(grace), self.parts))

    def explain(self) -> str:
        return self._culprit().explain()

    def _culprit(self) -> RemoteProcess:
        """The first part that has ended, else the first one."""
        return next((part for part in self.parts if not part.alive), self.parts[0])


def remote_process(
    index: int, options: ServerOptions, launcher: Launcher, log_folder: Path
) -> RemoteProcess | JointProcess:
    """Server `index` of `options` (`hosts.placed`), not started yet. `server_devices` of one on several nodes are those
    of each of its nodes."""
    name = f"SGLang server {index} ({url_of(options).removeprefix('http://')} on {' and '.join(options.nodes)})"
    if len(options.nodes) == 1:
        return RemoteProcess(name, options, launcher, log=log_folder / f"server_{index}.log")
    parts = []
    for part, node in enumerate(options.nodes):
        address, port = options.places[node]
        on_node = replace(options, part=part, host=address, port=port)
        log = log_folder / (f"server_{index}_node_{part}.log" if part else f"server_{index}.log")
        parts.append(RemoteProcess(name, on_node, launcher, log=log))
    return JointProcess(parts)

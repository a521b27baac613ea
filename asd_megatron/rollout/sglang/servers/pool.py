"""A pool of servers, with a router if asked for: started, restarted when one dies, and stopped."""

from __future__ import annotations

import atexit
import dataclasses
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

from asd_megatron.distributed import activity
from asd_megatron.errors import UserError
from asd_megatron.rollout.sglang.servers.hosts import Launcher, placed
from asd_megatron.rollout.sglang.servers.options import (
    ServerOptions,
    check_listening,
    command,
    free_port,
    pick_ports,
    router_command,
    secret_arguments,
    server_environment,
    url_of,
)
from asd_megatron.rollout.sglang.servers.process import ServerProcess
from asd_megatron.rollout.sglang.servers.remote import JointProcess, RemoteProcess, remote_process
from asd_megatron.rollout.sglang.servers.versions import Versions, check_environment

log = logging.getLogger(__name__)

WATCH_SECONDS = 0.5
PROGRESS_SECONDS = 15.0
SETTLED_SECONDS = 120.0  # healthy for so long: earlier restarts no longer count towards `max_restarts`
Process = ServerProcess | RemoteProcess | JointProcess
STOP_SECONDS = 2.0  # SGLang would drain requests for five, and none is needed any more


@dataclasses.dataclass
class _Watched:
    """A server and its state since `since` (a time of `time.monotonic()`)."""

    process: Process
    state: str = "new"  # new, starting, healthy, waiting (for its restart), given up
    since: float = 0.0
    restarts: int = 0  # since it was last settled


class ServerPool:
    """The servers of `options`, with their logs in `log_folder`. A start takes `start_timeout` seconds at most. Those
    that name nodes are started there by `launcher`, on the first free ports from `first_port` on; either all of
    them name nodes or none does. `versions`: of the packages in their environment.

    A server that dies is restarted on the same URL after a pause, `backoff[0]` seconds at first and doubled up to
    `backoff[1]`; after `max_restarts` without having been healthy for two minutes in between it is given up. A router
    is one more such process; it admits generation with the servers' generation key. `counters`: deaths, restarts,
    gave_up. `say` gets a sentence whenever something has happened. Between `defer_starts` and `allow_starts` none is
    restarted, so that servers on the trainer's devices do not take its memory.
    """

    def __init__(
        self,
        options: Sequence[ServerOptions],
        log_folder: Path,
        *,
        launcher: Launcher | None = None,
        first_port: int = 0,
        start_timeout: float = 600.0,
        router: bool = False,
        restart: bool = True,
        max_restarts: int = 5,
        backoff: tuple[float, float] = (1.0, 60.0),
        say: Callable[[str], None] = log.info,
    ) -> None:
        self.start_timeout, self.restart = start_timeout, restart
        self.max_restarts, self.backoff = max_restarts, backoff
        self.counters = {"deaths": 0, "restarts": 0, "gave_up": 0}
        self._say = say
        if launcher is None:
            chosen, self.versions = _here(options)
        else:
            chosen, self.versions = placed(options, launcher, first_port)
        self.processes = [_process(index, given, launcher, log_folder) for index, given in enumerate(chosen)]
        self.router = _router(chosen, log_folder, start_timeout) if router else None
        self.urls = [process.url for process in self.processes]
        self.router_url = self.router.url if self.router else None
        self._watched = [_Watched(process) for process in (*self.processes, *filter(None, [self.router]))]
        self._deferred = False
        self._changing = threading.Lock()  # one thread at a time changes the servers' states
        self._closing = threading.Event()
        self._watcher: threading.Thread | None = None
        self._pid = os.getpid()

    @property
    def states(self) -> list[str]:
        """States of servers, then the router: new, starting, healthy, dead, waiting (for its restart) or given up."""
        dead = [server.state in ("starting", "healthy") and not server.process.alive for server in self._watched]
        return ["dead" if gone else server.state for gone, server in zip(dead, self._watched, strict=True)]

    @property
    def restarting(self) -> list[str]:
        """The names of those that have died and are to be healthy again: not those given up."""
        states = zip(self._watched, self.states, strict=True)
        return [server.process.name for server, state in states if state in ("dead", "waiting", "starting")]

    def defer_starts(self) -> None:
        """Restart nothing until `allow_starts`. A server that is just starting is ended, and restarted then."""
        with self._changing:
            self._deferred = True
            for server in self._watched:
                if server.state == "starting":
                    server.process.stop(grace=0)
                    server.state, server.since = "waiting", time.monotonic()
                    server.restarts -= 1  # it has not failed

    def allow_starts(self) -> None:
        with self._changing:
            self._deferred = False

    def kill(self, url: str) -> None:
        """End the server at `url` at once. It is restarted like one that died."""
        with self._changing:
            next(process for process in self.processes if process.url == url).stop(grace=0)

    def start(self) -> Self:
        """Start all servers and return when all are healthy. Raises UserError, with nothing left running, otherwise."""
        atexit.register(self.close)
        try:
            deadline = time.monotonic() + self.start_timeout
            for server in self._watched:
                server.process.start()
            self._wait(deadline)
        except BaseException:
            self.close()
            raise
        for server in self._watched:
            server.state, server.since = "healthy", time.monotonic()
        self._watcher = threading.Thread(target=self._watch, name="sglang-servers", daemon=True)
        self._watcher.start()
        return self

    def _wait(self, deadline: float) -> None:
        begin = said = time.monotonic()
        waiting = [server.process for server in self._watched]
        again: set[str] = set()
        while waiting := [process for process in waiting if not process.healthy()]:
            dead = next((process for process in waiting if not process.alive), None)
            if dead is not None and dead.port_taken and dead.name not in again:
                again.add(dead.name)  # a port that it chose itself at the same moment as another server
                self._say(f"{dead.name} found a port in use: once more")
                dead.start()
                continue
            if dead is not None:
                raise UserError(f"{dead.name} ended with {dead.status} before it was ready{dead.explain()}")
            now = time.monotonic()
            if now > deadline:
                raise UserError(
                    f"{waiting[0].name} was not ready after {self.start_timeout:.0f} s: raise the limit"
                    f" (rollout.server_start_timeout, serve --start-timeout) if it is only slow"
                    f"{waiting[0].explain()}"
                )
            if now - said >= PROGRESS_SECONDS:
                said = now
                self._say(f"waiting for {', '.join(p.name for p in waiting)} since {now - begin:.0f} s")
            activity.mark()
            time.sleep(WATCH_SECONDS)

    def _watch(self) -> None:
        """Look at every server twice a second until the pool closes."""
        while not self._closing.wait(WATCH_SECONDS):
            for server in self._watched:
                with self._changing:
                    if not self._closing.is_set():
                        self._attend(server, time.monotonic())

    def _attend(self, server: _Watched, now: float) -> None:
        """Do what the state of a server requires now."""
        process = server.process
        if server.state == "waiting":
            if now >= server.since and not self._deferred:
                self._restart(server, now)
        elif server.state in ("starting", "healthy") and not process.alive:
            self._died(server, now, f"died ({process.status})")
        elif server.state == "starting":
            if process.healthy(timeout=2.0):
                server.state, server.since = "healthy", now
                self._say(f"{process.name} is healthy again")
            elif now - server.since > self.start_timeout:
                self._died(server, now, f"was not ready after {self.start_timeout:.0f} s")
        elif server.state == "healthy" and server.restarts and now - server.since > SETTLED_SECONDS:
            server.restarts = 0

    def _died(self, server: _Watched, now: float, how: str) -> None:
        self.counters["deaths"] += 1
        server.process.stop(grace=0)
        if not self.restart or server.restarts >= self.max_restarts:
            server.state = "given up"
            self.counters["gave_up"] += 1
            log.error("%s %s and is given up%s", server.process.name, how, server.process.explain())
            return
        pause = min(self.backoff[0] * 2**server.restarts, self.backoff[1])
        server.state, server.since = "waiting", now + pause
        self._say(f"{server.process.name} {how}: starting again in {pause:.3g} s ({server.process.log})")

    def _restart(self, server: _Watched, now: float) -> None:
        server.restarts += 1
        self.counters["restarts"] += 1
        server.state, server.since = "starting", now
        try:
            server.process.start()
        except UserError as error:
            self._died(server, now, f"cannot be started: {error}")

    def close(self) -> None:
        """End all servers together. Does nothing the second time, and in a forked child of the owner."""
        if os.getpid() != self._pid:
            return
        self._closing.set()
        if self._watcher is not None and self._watcher is not threading.current_thread():
            self._watcher.join(STOP_SECONDS)
        with ThreadPoolExecutor(max(1, len(self._watched))) as threads:
            list(threads.map(lambda server: server.process.stop(STOP_SECONDS), self._watched))
        atexit.unregister(self.close)

    def __enter__(self) -> Self:
        return self if self._watcher is not None else self.start()

    def __exit__(self, *raised: object) -> None:
        self.close()


def _here(options: Sequence[ServerOptions]) -> tuple[list[ServerOptions], Versions]:
    """`options` of this machine with ports, and the versions of their packages: environments and addresses checked."""
    found = [check_environment(python) for python in {given.python: None for given in options}]
    for given in options:
        check_listening(given)
    return pick_ports(options), found[0]


def _process(index: int, options: ServerOptions, launcher: Launcher | None, log_folder: Path) -> Process:
    """Server `index`, not started yet."""
    if launcher is not None:
        return remote_process(index, options, launcher, log_folder)
    return ServerProcess(
        f"SGLang server {index} ({url_of(options).removeprefix('http://')})",
        command(options),
        url=url_of(options),
        log=log_folder / f"server_{index}.log",
        secret=secret_arguments(options),
        environment=server_environment(options, os.environ),
    )


def _router(servers: Sequence[ServerOptions], log_folder: Path, start_timeout: float) -> ServerProcess:
    """A router on this machine before `servers`, not started yet: at their address, or before servers on other nodes at
    loopback."""
    first = servers[0]
    host = "127.0.0.1" if first.nodes else first.host
    if first.nodes:
        check_environment(first.python)
    ports = {server.port for server in servers}
    at = dataclasses.replace(first, host=host, port=free_port(host, ports), admin_key="", nodes=(), meeting="")
    metrics = free_port("127.0.0.1", ports | {at.port})
    return ServerProcess(
        f"sglang-router ({url_of(at).removeprefix('http://')})",
        router_command(at, [url_of(server) for server in servers], metrics, start_timeout),
        url=url_of(at),
        log=log_folder / "router.log",
        secret=secret_arguments(at),
        environment=server_environment(at, os.environ, direct=[server.host for server in servers]),
        health="/readiness",
    )

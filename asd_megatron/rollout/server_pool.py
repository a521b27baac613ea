"""Several servers of this machine: started at once, started again when one dies, ended together."""

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

from asd_megatron.errors import UserError
from asd_megatron.rollout.server import (
    ServerOptions,
    check_environment,
    check_host,
    command,
    free_port,
    secret_arguments,
    server_environment,
)
from asd_megatron.rollout.server_process import ServerProcess

log = logging.getLogger(__name__)

WATCH_SECONDS = 0.5
PROGRESS_SECONDS = 15.0
SETTLED_SECONDS = 120.0  # healthy for so long: its earlier deaths no longer count against it
STOP_SECONDS = 5.0


@dataclasses.dataclass
class _Watched:
    """A server and how its present life goes (times of `time.monotonic()`)."""

    process: ServerProcess
    state: str = "new"  # new, starting, healthy, waiting (for its restart), given up
    since: float = 0.0
    restarts: int = 0  # since it was last settled


class ServerPool:
    """The servers of `options`, with their logs in `log_folder`. Bounded in time: `start_timeout` seconds a start.

    A server that dies is started again on the same URL after a pause, `backoff[0]` seconds at first and doubled up to
    `backoff[1]`; after `max_restarts` without having been healthy for two minutes in between it is given up.
    `counters`: deaths, restarts, gave_up.
    """

    def __init__(
        self,
        options: Sequence[ServerOptions],
        log_folder: Path,
        *,
        start_timeout: float = 600.0,
        restart: bool = True,
        max_restarts: int = 5,
        backoff: tuple[float, float] = (1.0, 60.0),
        say: Callable[[str], None] = log.info,
    ) -> None:
        self.start_timeout, self.restart, self.max_restarts, self.backoff = (
            start_timeout,
            restart,
            max_restarts,
            backoff,
        )
        self.counters = {"deaths": 0, "restarts": 0, "gave_up": 0}
        self._say = say
        self._servers = _processes(options, log_folder)
        self._closing = threading.Event()
        self._watcher: threading.Thread | None = None
        self._pid = os.getpid()

    @property
    def urls(self) -> list[str]:
        """The servers' addresses, in the order of the options: they never change."""
        return [server.process.url for server in self._servers]

    @property
    def processes(self) -> list[ServerProcess]:
        """The servers' processes, in the order of the options."""
        return [server.process for server in self._servers]

    @property
    def states(self) -> list[str]:
        """How each server is: new, starting, healthy, dead, waiting (to be started again) or given up."""
        dead = [server.state in ("starting", "healthy") and not server.process.alive for server in self._servers]
        return ["dead" if gone else server.state for gone, server in zip(dead, self._servers, strict=True)]

    def start(self) -> Self:
        """Start all servers and return when all are healthy. Raises UserError, with nothing left running, otherwise."""
        atexit.register(self.close)
        try:
            deadline = time.monotonic() + self.start_timeout
            for server in self._servers:
                server.process.start()
            self._wait(deadline)
        except BaseException:
            self.close()
            raise
        for server in self._servers:
            server.state, server.since = "healthy", time.monotonic()
        self._watcher = threading.Thread(target=self._watch, name="sglang-servers", daemon=True)
        self._watcher.start()
        return self

    def _wait(self, deadline: float) -> None:
        begin = said = time.monotonic()
        waiting = self.processes
        while waiting := [process for process in waiting if not process.healthy()]:
            dead = next((process for process in waiting if not process.alive), None)
            if dead is not None:
                raise UserError(f"{dead.name} ended with {dead.status} before it was ready{dead.explain()}")
            now = time.monotonic()
            if now > deadline:
                raise UserError(
                    f"{waiting[0].name} was not ready after {self.start_timeout:.0f} s, the limit for a start"
                    f"{waiting[0].explain()}"
                )
            if now - said >= PROGRESS_SECONDS:
                said = now
                self._say(f"waiting for {', '.join(p.name for p in waiting)} since {now - begin:.0f} s")
            time.sleep(WATCH_SECONDS)

    def _watch(self) -> None:
        """Until the pool closes: see to every server, again and again."""
        while not self._closing.wait(WATCH_SECONDS):
            for server in self._servers:
                if not self._closing.is_set():
                    self._attend(server, time.monotonic())

    def _attend(self, server: _Watched, now: float) -> None:
        """One look at a server: what its state asks for now."""
        process = server.process
        if server.state == "waiting":
            if now >= server.since:
                self._start_again(server, now)
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
        self._say(f"{server.process.name} {how}: starting again in {pause:.0f} s ({server.process.log})")

    def _start_again(self, server: _Watched, now: float) -> None:
        server.restarts += 1
        self.counters["restarts"] += 1
        server.state, server.since = "starting", now
        try:
            server.process.start()
        except UserError as error:
            self._died(server, now, f"cannot be started: {error}")

    def close(self) -> None:
        """End all servers, at once; again does nothing. In a forked child of the owner it does nothing either."""
        if os.getpid() != self._pid:
            return
        self._closing.set()
        if self._watcher is not None and self._watcher is not threading.current_thread():
            self._watcher.join(STOP_SECONDS)
        with ThreadPoolExecutor(max(1, len(self._servers))) as threads:
            list(threads.map(lambda process: process.stop(STOP_SECONDS), self.processes))
        atexit.unregister(self.close)

    def __enter__(self) -> Self:
        return self if self._watcher is not None else self.start()

    def __exit__(self, *raised: object) -> None:
        self.close()


def _processes(options: Sequence[ServerOptions], log_folder: Path) -> list[_Watched]:
    """The processes of `options`, their environments checked and their ports decided."""
    for python in {o.python for o in options}:
        check_environment(python)
    ports = {o.port for o in options if o.port}
    servers = []
    for index, given in enumerate(options):
        check_host(given.host)
        chosen = dataclasses.replace(given, port=given.port or free_port(given.host, ports))
        ports.add(chosen.port)
        host = f"[{chosen.host}]" if ":" in chosen.host else chosen.host
        process = ServerProcess(
            f"SGLang server {index} ({host}:{chosen.port})",
            command(chosen),
            url=f"http://{host}:{chosen.port}",
            log=log_folder / f"server_{index}.log",
            secret=secret_arguments(chosen),
            environment=server_environment(chosen, os.environ),
        )
        servers.append(_Watched(process))
    return servers

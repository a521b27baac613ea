"""Device memory of colocated servers: offloaded while the trainer works, resident while rollouts are generated.

SGLang names three parts of it by tags: `weights`, `kv_cache` and `cuda_graph`. Releasing the weights drops them: they
must be sent again, even at the same version. SGLang ends itself when it is told to release memory while it is not
idle, or to resume a tag that is not released, so each server's tags are tracked here:

    offload()                 pause, release all resident tags        training: nothing is resident
    resume_weights()          resume `weights`                        their contents are lost
    (weights are sent)
    resume_caches(receiver)   resume `kv_cache` and `cuda_graph`      generation: all is resident
"""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from dataclasses import dataclass, field

from asd_megatron.distributed import activity
from asd_megatron.rollout.sglang.client.fleet import Fleet, ServerView
from asd_megatron.rollout.sglang.servers.pool import ServerPool
from asd_megatron.rollout.sglang.weight_sync.protocol import SLACK_SECONDS, Receiver, ask, ask_all

log = logging.getLogger(__name__)

WEIGHTS = frozenset({"weights"})
CACHES = frozenset({"kv_cache", "cuda_graph"})
MEMORY_SECONDS = 60.0  # for one request to release or resume memory
LOOK_SECONDS = 0.2  # between looks at servers that are being restarted


@dataclass(frozen=True)
class ServerReceiver:
    """A server as the weight transports see it."""

    fleet: Fleet
    url: str
    tensor_parallel: int

    @classmethod
    def of(cls, fleet: Fleet, view: ServerView) -> ServerReceiver:
        return cls(fleet, view.url, view.tensor_parallel)

    def call(self, path: str, body: dict[str, object], timeout: float) -> dict[str, object]:
        return self.fleet.call(self.url, path, body, timeout)


@dataclass
class _Offloaded:
    """The released tags of one server process; `started` is its start time."""

    started: object
    tags: frozenset[str] = field(default=frozenset())


class ColocatedMemory:
    """The memory of all servers of `fleet`, which `pool` has started on the trainer's devices.

    A server that does not release or resume its memory when asked is killed, so that the trainer always gets all of it,
    and restarted. Servers are started only while generation has the devices: `resume_weights` waits for those that died
    meanwhile, at most `start_timeout` seconds.
    """

    def __init__(self, fleet: Fleet, pool: ServerPool, start_timeout: float) -> None:
        self._fleet, self._pool, self._start_timeout = fleet, pool, start_timeout
        self._servers: dict[str, _Offloaded] = {}  # by URL, those with released tags
        self._hold = ExitStack()  # keeps requests and probes away while the memory is offloaded
        self.offloaded = False

    def offload(self) -> None:
        """Release the memory of every server. Their weights are lost: no server may serve until it is sent new ones.
        Nothing may be running. A second call in a row does nothing."""
        if self.offloaded:
            return
        self._pool.defer_starts()
        try:
            self._hold.enter_context(self._fleet.quiesced())
        except Exception:  # nothing was released: the next call tries again
            self._pool.allow_starts()
            raise
        self.offloaded = True
        receivers = self._receivers()
        failures = ask_all(receivers, self._release, 3 * MEMORY_SECONDS + SLACK_SECONDS)[1]
        for receiver in receivers:
            if receiver.url in failures:
                self._kill(receiver.url, failures[receiver.url])
            else:
                self._fleet.withdraw(receiver.url, "its memory is offloaded")

    def resume_weights(self) -> None:
        """Take back the memory of the weights, not their contents. A second call in a row does nothing."""
        if not self.offloaded:
            return
        self._pool.allow_starts()
        self._wait_for_restarts()
        failures = ask_all(self._receivers(), lambda r: self._resume(r, WEIGHTS), 2 * MEMORY_SECONDS + SLACK_SECONDS)[1]
        for url, reason in failures.items():
            self._kill(url, reason)
        self.offloaded = False
        self._hold.close()

    def resume_caches(self, receiver: Receiver) -> None:
        """Take back the rest of a server's memory, once it has its weights. Called for several servers in parallel."""
        try:
            self._resume(receiver, CACHES)
        except Exception as error:
            self._kill(receiver.url, str(error))
            raise

    def _receivers(self) -> list[Receiver]:
        return [ServerReceiver.of(self._fleet, view) for view in self._fleet.servers()]

    def _release(self, receiver: Receiver) -> None:
        server = self._current(receiver) or _Offloaded(self._started(receiver))
        ask(receiver, "/pause_generation", {"mode": "retract"}, MEMORY_SECONDS)
        if tags := (WEIGHTS | CACHES) - server.tags:
            ask(receiver, "/release_memory_occupation", {"tags": sorted(tags)}, MEMORY_SECONDS)
        server.tags |= tags
        self._servers[receiver.url] = server

    def _resume(self, receiver: Receiver, tags: frozenset[str]) -> None:
        server = self._current(receiver)
        if server is not None and (released := server.tags & tags):
            ask(receiver, "/resume_memory_occupation", {"tags": sorted(released)}, MEMORY_SECONDS)
            server.tags -= released

    def _current(self, receiver: Receiver) -> _Offloaded | None:
        """The released tags of the server's process; None when it has released nothing (a restarted one has not)."""
        server = self._servers.get(receiver.url)
        if server is not None and server.started != self._started(receiver):
            self._servers.pop(receiver.url, None)
            return None
        return server

    def _started(self, receiver: Receiver) -> object:
        return self._fleet.server_info(receiver.url, MEMORY_SECONDS).get("startup_time")

    def _kill(self, url: str, reason: str) -> None:
        """Kill a server whose memory is in an unknown state; the pool restarts it."""
        log.warning("memory of %s: %s; the server is restarted", url, reason)
        self._servers.pop(url, None)
        self._pool.kill(url)
        self._fleet.mark_unhealthy(url, reason)

    def _wait_for_restarts(self) -> None:
        deadline = time.monotonic() + self._start_timeout
        while (waiting := self._pool.restarting) and time.monotonic() < deadline:
            activity.mark()
            time.sleep(LOOK_SECONDS)
        if waiting:
            log.warning(
                "not restarted within %.0f s (rollout.server_start_timeout), so the run continues without: %s",
                self._start_timeout,
                ", ".join(waiting),
            )

"""Health probes of the servers, every few seconds and at once after a failure. Inside one event loop."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress

from asd_megatron.distributed import activity
from asd_megatron.errors import UserError
from asd_megatron.rollout.sglang.client.api import ServerBusy, ServerError, ServerLate, ServerRefused
from asd_megatron.rollout.sglang.client.requests import Dispatcher, Member
from asd_megatron.rollout.sglang.servers.versions import OLDEST_TEXT, too_old

log = logging.getLogger(__name__)

BETWEEN_ROUNDS = 0.5  # seconds, while waiting for all servers at the start
SAY_SECONDS = 15.0  # between two lines about servers that are waited for
PROBE_REQUESTS = 3  # of one probe, each with the prober's time limit
MISSED_PROBES = 3  # in a row until a working server counts as unhealthy: it may be busy with a long prompt


class Prober:
    """Probes every server (and the router) and reports its health to the dispatcher.

    A server has to generate a token. One that was withdrawn may have its generation paused: its scheduler has to
    answer, until it is seen to have been restarted. No probe starts between `hold` and `release`, and the answers of
    earlier ones do not count.
    """

    def __init__(self, dispatcher: Dispatcher, every: float, timeout: float) -> None:
        self._dispatcher = dispatcher
        self._every = every
        self._timeout = timeout
        self._allowed = asyncio.Event()
        self._allowed.set()
        self._epoch = 0
        self._holds = 0
        self._in_flight: set[asyncio.Task[None]] = set()
        self._watches: list[asyncio.Task[None]] = []

    @property
    def _everybody(self) -> list[Member]:
        router = self._dispatcher.router
        return [*self._dispatcher.members, *([] if router is None else [router])]

    async def connect(self, timeout: float) -> None:
        """Wait until every server (and the router, if there is one) works; then keep probing them.

        Raises UserError if a server refuses a key or is too old, or, naming each that does not work, after `timeout`
        seconds.
        """
        began = said = time.monotonic()
        while True:
            await self._round(began + timeout)
            if all(member.healthy for member in self._everybody):
                break
            now = time.monotonic()
            if now > began + timeout:
                raise UserError(
                    f"rollout servers do not work after {timeout:.0f} s (rollout.server_start_timeout):\n"
                    f"{self._unhealthy()}\n"
                    "Start them (`asd-megatron serve MODEL`), or correct their URLs in the recipe."
                )
            if now - said >= SAY_SECONDS:
                said = now
                log.warning("waiting for rollout servers since %.0f s:\n%s", now - began, self._unhealthy())
            activity.mark()
            await asyncio.sleep(BETWEEN_ROUNDS)
        if not self._watches:
            self._watches = [asyncio.create_task(self._watch(member)) for member in self._everybody]

    async def _round(self, deadline: float) -> None:
        tasks = [asyncio.create_task(self._first_probe(member)) for member in self._everybody if not member.healthy]
        if not tasks:
            return
        done, late = await asyncio.wait(tasks, timeout=max(deadline - time.monotonic(), 0.0))
        for task in late:
            task.cancel()
        errors = [task.exception() for task in done]  # all of them: asyncio reports one that nobody looked at
        for error in errors:
            if error is not None:
                raise error

    def hold(self) -> None:
        """No probe starts until `release` has been called as often: a server whose weights are being replaced, or
        whose memory is offloaded, cannot generate."""
        self._epoch += 1
        self._holds += 1
        self._allowed.clear()

    async def wait_for_probes(self) -> None:
        """Return when no probe is in flight any more, or after the time limit of one request."""
        if self._in_flight:
            await asyncio.wait(self._in_flight, timeout=self._timeout)

    def release(self) -> None:
        self._holds -= 1
        if not self._holds:
            self._allowed.set()
            for member in self._everybody:
                if not member.healthy:
                    member.wake.set()

    async def _watch(self, member: Member) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._every):
                    await member.wake.wait()
            await self._allowed.wait()
            member.wake.clear()
            probe = asyncio.create_task(self._probe(member))
            self._in_flight.add(probe)
            try:
                with suppress(ServerRefused):  # is the member's reason by now
                    await probe
            finally:
                self._in_flight.discard(probe)

    async def _first_probe(self, member: Member) -> None:
        """Also resumes generation on a server that an earlier run left paused, and so shows whether the administration
        key is right."""
        try:
            if member is not self._dispatcher.router:
                await member.server.post("/continue_generation", None, self._timeout)
        except ServerRefused:
            raise
        except ServerError as error:
            self._dispatcher.mark_unhealthy(member, error.what)
        else:
            await self._probe(member)

    async def _probe(self, member: Member) -> None:
        epoch = self._epoch
        try:
            if member is self._dispatcher.router:
                await member.server.routing(self._timeout)
            else:
                await self._check(member, epoch)
        except ServerError as error:
            if epoch == self._epoch and not self._may_be_busy(member, error):
                self._dispatcher.mark_unhealthy(member, error.what)
            if isinstance(error, ServerRefused):
                raise
        else:
            member.missed = 0
            if epoch == self._epoch:
                self._dispatcher.mark_healthy(member)

    def _may_be_busy(self, member: Member, error: ServerError) -> bool:
        """Whether a server that has worked so far is given another chance."""
        if not member.healthy or not isinstance(error, ServerLate | ServerBusy):
            return False
        member.missed += 1
        return member.missed < MISSED_PROBES

    async def _check(self, member: Member, epoch: int) -> None:
        """Raises a ServerError unless the server works and has the weights that it was admitted with. Generates nothing
        if a hold has begun since `epoch`."""
        admitted = member.label
        model = await member.server.model_info(self._timeout)
        member.reported = str(model.get("weight_version", ""))
        if admitted is not None and member.label == admitted != member.reported:
            raise ServerError(member.url, f"has the weights {member.reported!r} and was admitted with {admitted!r}")
        info = await member.server.server_info(self._timeout)
        member.version = str(info.get("version", ""))
        member.tensor_parallel = int(info.get("tp_size") or 1)
        if too_old(member.version):
            raise ServerRefused(member.url, _too_old(member.version), 0)
        started = info.get("startup_time")
        if started != member.started:
            member.started, member.withdrawn = started, False
        if not member.withdrawn and epoch == self._epoch:
            await member.server.healthy(self._timeout)

    def _unhealthy(self) -> str:
        return "\n".join(f"  {member.url} {member.reason}" for member in self._everybody if not member.healthy)


def _too_old(version: str) -> str:
    return (
        f"runs SGLang {version or 'of an unknown version'}: {OLDEST_TEXT} or newer is needed, older ones are open to"
        " CVE-2026-3059 and CVE-2026-3060; upgrade its environment"
    )

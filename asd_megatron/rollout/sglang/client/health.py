"""Which servers work: asked every few seconds, and at once when one has failed. Inside one event loop."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress

from asd_megatron.errors import UserError
from asd_megatron.rollout.sglang.client.api import ServerBusy, ServerError, ServerLate, ServerRefused
from asd_megatron.rollout.sglang.client.requests import Attempts, Member
from asd_megatron.rollout.sglang.servers.versions import OLDEST, too_old

BETWEEN_ROUNDS = 0.5  # seconds, while waiting for the first server
PATIENCE = 3  # probes in a row that a working server may leave unanswered: it may be busy with a long prompt


class Prober:
    """Asks every server (and the router) how it is and tells those who send samples there.

    A server has to generate a token. One that was withdrawn may stand with its generation paused: it has to answer
    through its scheduler, until it is seen to have started anew. Nobody is asked between `hold` and `release`, and
    answers to questions asked before do not count.
    """

    def __init__(self, attempts: Attempts, every: float, timeout: float) -> None:
        self._attempts = attempts
        self._every = every
        self._timeout = timeout
        self._allowed = asyncio.Event()
        self._allowed.set()
        self._epoch = 0
        self._holds = 0
        self._watches: list[asyncio.Task[None]] = []

    @property
    def _everybody(self) -> list[Member]:
        router = self._attempts.router
        return [*self._attempts.members, *([] if router is None else [router])]

    async def connect(self, timeout: float) -> None:
        """Wait until one server at least (and the router, if there is one) works; then keep watching them all.

        Raises UserError if a server refuses a key or is too old, or if none works within `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while True:
            await self._round(deadline)
            router = self._attempts.router
            if any(m.healthy for m in self._attempts.members) and (router is None or router.healthy):
                break
            if time.monotonic() > deadline:
                raise UserError(self._nobody(timeout))
            await asyncio.sleep(BETWEEN_ROUNDS)
        if not self._watches:
            self._watches = [asyncio.create_task(self._watch(member)) for member in self._everybody]

    async def _round(self, deadline: float) -> None:
        tasks = [asyncio.create_task(self._first_probe(member)) for member in self._everybody]
        done, late = await asyncio.wait(tasks, timeout=max(deadline - time.monotonic(), 0.0))
        for task in late:
            task.cancel()
        errors = [task.exception() for task in done]  # all of them: asyncio reports one that nobody looked at
        for error in errors:
            if error is not None:
                raise error

    def hold(self) -> None:
        """No probe counts until as many calls of `release`: a server whose weights are replaced generates nothing."""
        self._epoch += 1
        self._holds += 1
        self._allowed.clear()

    def release(self) -> None:
        self._holds -= 1
        if not self._holds:
            self._allowed.set()

    def stop(self) -> None:
        for watch in self._watches:
            watch.cancel()

    async def _watch(self, member: Member) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._every):
                    await member.wake.wait()
            await self._allowed.wait()
            member.wake.clear()
            with suppress(ServerRefused):  # has become the member's reason
                await self._probe(member)

    async def _first_probe(self, member: Member) -> None:
        """Also wakes a server that an earlier run left with its generation paused, and so shows whether the
        administration key is right."""
        try:
            if member is not self._attempts.router:
                await member.server.post("/continue_generation", None, self._timeout)
        except ServerRefused:
            raise
        except ServerError as error:
            self._attempts.eject(member, error.what)
        else:
            await self._probe(member)

    async def _probe(self, member: Member) -> None:
        epoch = self._epoch
        try:
            if member is self._attempts.router:
                await member.server.routing(self._timeout)
            else:
                await self._ask(member)
        except ServerError as error:
            if epoch == self._epoch and not self._may_be_busy(member, error):
                self._attempts.eject(member, error.what)
            if isinstance(error, ServerRefused):
                raise
        else:
            member.missed = 0
            if epoch == self._epoch:
                self._attempts.welcome(member)

    def _may_be_busy(self, member: Member, error: ServerError) -> bool:
        """Whether a server that has worked so far is given another chance."""
        if not member.healthy or not isinstance(error, ServerLate | ServerBusy):
            return False
        member.missed += 1
        return member.missed < PATIENCE

    async def _ask(self, member: Member) -> None:
        """Raises a ServerError unless the server works and has the weights that it was admitted with."""
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
        if not member.withdrawn:
            await member.server.healthy(self._timeout)

    def _nobody(self, timeout: float) -> str:
        reasons = "\n".join(f"  {member.url} {member.reason}" for member in self._everybody if not member.healthy)
        return (
            f"no rollout server works after {timeout:.0f} s:\n{reasons}\n"
            "Start them (`asd-megatron serve MODEL`), or correct their URLs in the recipe."
        )


def _too_old(version: str) -> str:
    oldest = ".".join(map(str, OLDEST))
    return (
        f"runs SGLang {version or 'of an unknown version'}: {oldest} or newer is needed, older ones are open to"
        " CVE-2026-3059 and CVE-2026-3060; upgrade its environment"
    )

"""A server that speaks the part of SGLang's HTTP interface that the client uses, and fails when told to."""

from __future__ import annotations

import asyncio
import base64
import itertools
import ssl
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
from aiohttp import web

from asd_megatron.rollout.sglang.client.routing import Routing
from asd_megatron.rollout.sglang.servers.plugin.asd_weight_delta import FORMAT, MARK

API_KEY, ADMIN_KEY = "generation", "administration"
TAGS = frozenset({"weights", "kv_cache", "cuda_graph"})


def made_from(input_ids: list[int], tokens: int) -> list[int]:
    """What the fake answers: a function of the prompt."""
    return [(sum(input_ids) * 7 + position) % 999 for position in range(tokens)]


def routes_of(tokens: int, routing: Routing) -> np.ndarray[Any, Any]:
    """The routed experts that the fake answers for so many tokens: int32 [tokens - 1, layers, per_token]."""
    shape = (tokens - 1, routing.layers, routing.per_token)
    return (np.arange(np.prod(shape)) % routing.experts).astype(np.int32).reshape(shape)


GARBAGE = 999  # every token of an answer that was generated with lost weights


class FakeSGLang:
    """One server in a thread of its own. Its attributes may be changed while it runs.

    faults: what happens to the next `/generate` requests, one each: hang, reset, slow, label, abort, malformed, nan,
    mixed, routes (of other tokens), or an HTTP status. always: the same for all when `faults` is empty. routing: of the
    model; None: no routed experts are returned. takes_deltas: as with our plugin. delay: seconds a sample takes.
    health_delay: seconds a health probe takes, in which it generates. refuse: POST paths answered with status 500.
    slow_posts: seconds until other POSTs are answered.

    Memory is as in SGLang: `offloaded` holds the released tags; released weights are lost until `/load_weights`. The
    scheduler dies (`died_of`) of a release while it is not paused, of a tag that is released or resumed twice, and of
    generating or loading weights without memory.
    """

    def __init__(
        self,
        *,
        label: str = "default",
        delay: float = 0.0,
        version: str = "0.5.23",
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.label = label
        self.delay = delay
        self.version = version
        self.faults: deque[str] = deque()
        self.always = ""
        self.healthy = True
        self.paused = False
        self.dead = False
        self.hung = False
        self.life = 0  # another one after each restart
        self.routing: Routing | None = None
        self.takes_deltas = True
        self.spans: Callable[[int], list[dict[str, Any]]] | None = None
        self.prompts: list[list[int]] = []
        self.posts: list[str] = []
        self.refuse: set[str] = set()
        self.slow_posts = 0.0
        self.health_delay = 0.0
        self.probing = 0  # health probes that are generating
        self.probing_at_release: list[int] = []
        self.offloaded: frozenset[str] = frozenset()
        self.weights_lost = False
        self.died_of: list[str] = []
        self.running = self.most_running = self.cancelled = 0
        self._open: set[asyncio.Transport] = set()
        self._aborts = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._runner, self.url = asyncio.run_coroutine_threadsafe(self._start(tls), self._loop).result()

    async def _start(self, tls: ssl.SSLContext | None) -> tuple[web.AppRunner, str]:
        app = web.Application(middlewares=[self._front])
        app.router.add_get("/health", self._health)
        app.router.add_get("/readiness", self._health)  # as sglang-router has it
        app.router.add_get("/model_info", self._model_info)
        app.router.add_get("/server_info", self._server_info)
        app.router.add_post("/generate", self._generate)
        app.router.add_post("/{tail:.*}", self._admin)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls)
        await site.start()
        return runner, f"{'https' if tls else 'http'}://127.0.0.1:{runner.addresses[0][1]}"

    # what happens to it

    def die(self) -> None:
        """As kill -9 does: every connection breaks, none is accepted."""
        self.dead = True
        self._loop.call_soon_threadsafe(lambda: [transport.abort() for transport in self._open])

    def restart(self) -> None:
        """A new process: other weights, nothing paused, all of its memory."""
        self.dead = self.paused = self.hung = self.weights_lost = False
        self.offloaded = frozenset()
        self.label, self.life = "default", self.life + 1

    def crash(self, reason: str) -> None:
        """The scheduler dies of an error of its own, as of a failed assertion."""
        self.died_of.append(reason)
        self.die()

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)

    # what it answers

    @web.middleware
    async def _front(self, request: web.Request, handler: Any) -> web.StreamResponse:
        transport = request.transport
        assert transport is not None
        self._open.add(transport)
        try:
            if self.dead:
                transport.abort()
            while self.hung:
                await asyncio.sleep(0.02)
            public = request.path in ("/health", "/readiness")
            admin = request.path not in ("/generate", "/model_info", "/server_info")
            key = ADMIN_KEY if admin else API_KEY
            if not public and request.headers.get("Authorization") != f"Bearer {key}":
                return web.json_response({"error": "Unauthorized"}, status=401)
            response: web.StreamResponse = await handler(request)
            if self.dead:  # it died of this request
                transport.abort()
            return response
        finally:
            self._open.discard(transport)

    async def _health(self, _: web.Request) -> web.Response:
        if self.health_delay:
            self.probing += 1
            await asyncio.shield(self._probe())  # a probe that nobody waits for any more still completes
        elif self.offloaded and not self.paused:
            self.crash("a health probe generates without memory")
        return web.Response(status=200 if self.healthy and not self.paused else 503)

    async def _probe(self) -> None:
        try:
            await asyncio.sleep(self.health_delay)
        finally:
            self.probing -= 1

    async def _model_info(self, _: web.Request) -> web.Response:
        return web.json_response({"weight_version": self.label, "architectures": ["Fake"]})

    async def _server_info(self, _: web.Request) -> web.Response:
        info = {"version": self.version, "tp_size": 2, "startup_time": {"life": self.life}}
        info |= {"internal_states": [{MARK: FORMAT} if self.takes_deltas else {}]}
        return web.json_response(info | {"enable_return_routed_experts": self.routing is not None})

    async def _admin(self, request: web.Request) -> web.Response:
        self.posts.append(request.path)
        body = await request.json()
        await asyncio.sleep(self.slow_posts)
        if request.path in self.refuse:
            return web.json_response({"error": f"{request.path} refused on purpose"}, status=500)
        if request.path in ("/release_memory_occupation", "/resume_memory_occupation"):
            self._move_memory(request.path == "/release_memory_occupation", frozenset(body.get("tags") or TAGS))
        elif request.path == "/load_weights":  # stands for every transport
            if "weights" in self.offloaded:
                self.crash("weights are loaded into released memory")
            self.weights_lost = False
        elif request.path == "/abort_request":
            self._aborts += bool(body["abort_all"])
        elif request.path in ("/pause_generation", "/continue_generation"):
            self.paused = request.path == "/pause_generation"
        elif request.path == "/update_weight_version":
            self.label = body["new_version"]
        elif request.path == "/fails":
            return web.json_response({"success": False, "message": "it failed"}, status=400)
        elif request.path == "/text":
            return web.Response(text="Cache flushed.")
        elif request.path == "/list":
            return web.json_response([body])
        return web.json_response({"success": True})

    def _move_memory(self, release: bool, tags: frozenset[str]) -> None:
        if not release:
            if not tags <= self.offloaded:
                self.crash(f"resumed {sorted(tags - self.offloaded)}, which were not released")
            self.offloaded -= tags
            return
        self.probing_at_release.append(self.probing)
        if not self.paused:
            self.crash("released memory without a pause: a probe may make it busy at any time")
        elif tags & self.offloaded:
            self.crash(f"released {sorted(tags & self.offloaded)} twice")
        self.offloaded |= tags
        self.weights_lost |= "weights" in tags

    async def _generate(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.prompts.append(body["input_ids"])
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            return await self._sample(request, body, self.faults.popleft() if self.faults else self.always)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1

    async def _sample(self, request: web.Request, body: dict[str, Any], fault: str) -> web.Response:
        if fault.isdigit():
            return web.json_response({"error": {"message": f"status {fault}"}}, status=int(fault))
        if fault == "reset" and request.transport:
            request.transport.abort()
        aborts = self._aborts
        wanted = body["sampling_params"]["max_new_tokens"]
        seconds = 3600.0 if fault == "hang" else 0.5 if fault == "slow" else self.delay
        done = 0
        for step in itertools.count():
            done = wanted if seconds == 0 else min(wanted, int(wanted * step * 0.01 / seconds))
            if (done == wanted and not self.paused) or self._aborts > aborts:
                break
            await asyncio.sleep(0.01)
        if self.offloaded and done:
            self.crash("generated without memory")
        reason = "abort" if self._aborts > aborts or fault == "abort" else "length"
        ids = [GARBAGE] * done if self.weights_lost else made_from(body["input_ids"], done)
        answer = self._answer(ids, reason, fault)
        if self.routing is not None and body.get("return_routed_experts"):
            tokens = len(body["input_ids"]) + len(ids) + (fault == "routes")
            routes = base64.b64encode(routes_of(tokens, self.routing).tobytes()).decode()
            answer["meta_info"]["routed_experts"] = routes
        return web.json_response(answer)

    def _answer(self, ids: list[int], reason: str, fault: str) -> dict[str, Any]:
        label = "other" if fault == "label" else self.label
        spans = self.spans(len(ids)) if self.spans else [{"version": label, "start": 0, "end": len(ids)}]
        if fault == "mixed":
            spans = [{"version": "other", "start": 0, "end": 1}, {"version": label, "start": 1, "end": len(ids)}]
        return {
            "output_ids": ids[:-1] if fault == "malformed" else ids,
            "meta_info": {
                "finish_reason": {"type": reason},
                "weight_version": label,
                "weight_versions": spans,
                "output_token_logprobs": [[None if fault == "nan" else -0.5, token, None] for token in ids],
            },
        }

"""The fleet of rollout servers behind one interface: each sample is answered once, even if servers fail."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Coroutine, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import aiohttp

from asd_megatron.errors import UserError
from asd_megatron.rollout.engine import RolloutError
from asd_megatron.rollout.sglang.client.api import ServerLate, SGLangServer, new_session
from asd_megatron.rollout.sglang.client.health import PROBE_REQUESTS, Prober
from asd_megatron.rollout.sglang.client.loop import LoopThread
from asd_megatron.rollout.sglang.client.requests import Counters, Dispatcher, Member
from asd_megatron.rollout.sglang.client.scheduling import SampleRequest, SampleResult

T = TypeVar("T")
ROUTER_LIMIT = 0  # follows from the servers behind it
INFO_SECONDS = 20.0
ABORT_PATIENCE = 30.0  # seconds in which partial outputs are waited for


@dataclass(frozen=True)
class ServerView:
    """The state of a server. `label`: the weights that it was admitted with, None: it may not serve; `reported`: the
    label that it reports. `reason`: why it does not serve. `in_flight` leaves out requests through a router. `probed`:
    `time.monotonic()` of the last probe that found it healthy.
    """

    url: str
    healthy: bool
    label: str | None
    in_flight: int
    reason: str
    reported: str
    version: str
    tensor_parallel: int
    probed: float


class Fleet:
    """SGLang servers behind one thread-safe, synchronous interface; an event loop in its own thread does the work.

    **Serving.** A server serves from `admit(url, label)` until `withdraw`, two failures in a row, three probes without
    an answer, or a refused connection. Every sample is generated under admitted weights: an answer whose label says
    otherwise is discarded. A change of weights happens inside `updating(label)`: running requests stay where they are.
    `quiesced()` also waits for health probes, so that a server's memory can be offloaded.

    **Samples.** Each submitted sample is returned once, by `wait` or by `abort`. A failed attempt is retried, on
    another server if possible; after `retries` of them the sample is returned as an abort. At most `max_concurrent`
    samples are in flight on a server, and an attempt may take `request_timeout` seconds. Samples of a group go to one
    server, or where the router at `router_url` places them.

    **Failures.** While samples wait and no server may serve, `no_healthy_server_since` says since when. What a server
    refuses for good (a wrong key, a prompt that is too long) is raised by `wait` as UserError until `abort` is called.
    Every call returns within its time limit, or raises an error that names what it waited for.

    URLs may be https; `ca_file` (PEM) replaces the system's certificates. Raises UserError for URLs that are none.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        api_key: str = "",
        admin_key: str = "",
        max_concurrent: int = 64,
        request_timeout: float = 600.0,
        retries: int = 3,
        probe_every: float = 5.0,
        probe_timeout: float = 20.0,
        router_url: str | None = None,
        ca_file: str | None = None,
    ) -> None:
        _check(urls, router_url)
        self._news = threading.Condition()
        self._finished: list[SampleResult] = []
        self._error: Exception | None = None
        self._pending: set[Hashable] = set()
        self._listener: Callable[[SampleResult], None] = lambda result: None
        self._loop = LoopThread("rollout-fleet")
        self._probe_timeout = probe_timeout
        try:
            self._session = self._loop.run(_open_session(), "opening connections")

            def member(url: str, limit: int) -> Member:
                server = SGLangServer(url, self._session, api_key, admin_key, ca_file)
                return Member(server.url, limit, server=server)

            self._members = {m.url: m for m in [member(url, max_concurrent) for url in urls]}
            self._dispatcher = Dispatcher(
                list(self._members.values()),
                None if router_url is None else member(router_url, ROUTER_LIMIT),
                request_timeout=request_timeout,
                retries=retries,
                deliver=self._deliver,
                refuse=self._refuse,
            )
            self._prober = Prober(self._dispatcher, probe_every, probe_timeout)
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------------ servers

    def connect(self, timeout: float) -> None:
        """Wait until all servers work, at most `timeout` seconds. Raises UserError that names each server that does
        not and why; at once if one refuses a key or is older than SGLang 0.5.10."""
        self._loop.run(self._prober.connect(timeout), "connecting to the servers", timeout)

    def servers(self) -> list[ServerView]:
        """All servers in the order given, without the router."""

        async def view() -> list[ServerView]:
            return [_view(member) for member in self._members.values()]

        return self._loop.run(view(), "reading the servers' states")

    def admit(self, url: str, label: str) -> None:
        """The server at `url` has exactly the weights `label`: it serves from now on."""

        async def admit() -> None:
            self._dispatcher.admit(self._member(url), label)

        self._loop.run(admit(), f"admitting {url}")

    def withdraw(self, url: str, reason: str) -> None:
        """The server at `url` may not serve; its running samples are sent to others.

        It may be left with its generation paused: until it is admitted again it counts as healthy when its scheduler
        answers.
        """

        async def withdraw() -> None:
            self._dispatcher.withdraw(self._member(url), reason)

        self._loop.run(withdraw(), f"withdrawing {url}")

    def mark_unhealthy(self, url: str, reason: str) -> None:
        """The server at `url` does not work; the next successful probe makes it healthy again."""

        async def mark() -> None:
            self._dispatcher.mark_unhealthy(self._member(url), reason)

        self._loop.run(mark(), f"marking {url} as unhealthy")

    @contextmanager
    def updating(self, label: str) -> Iterator[None]:
        """Around a change of the servers' weights to `label`: no server is probed, no sample sent, no time limit runs.

        Running samples continue when their server does. Answers generated under `label` before their server is admitted
        with it wait for that; those of a server that is not admitted by the end are discarded. May be nested.
        """
        with self._held(label):
            yield

    @contextmanager
    def quiesced(self) -> Iterator[None]:
        """While the servers cannot generate because their memory is offloaded: as `updating`, and entered only when no
        probe is in flight any more (bounded by the time limits of a probe's requests)."""
        with self._held(None):
            limit = PROBE_REQUESTS * self._probe_timeout
            self._loop.run(self._prober.wait_for_probes(), "waiting for health probes in flight", limit)
            yield

    @contextmanager
    def _held(self, label: str | None) -> Iterator[None]:
        async def hold() -> None:
            self._prober.hold()
            self._dispatcher.hold(label)

        async def release() -> None:
            self._prober.release()
            self._dispatcher.release()

        self._loop.run(hold(), "holding requests")
        try:
            yield
        finally:
            if not self._loop.closed:  # while held
                self._loop.run(release(), "releasing requests")

    def call(self, url: str, path: str, body: Mapping[str, Any] | None = None, timeout: float = 60.0) -> dict[str, Any]:
        """A POST to one server with the key that its path needs; its JSON object. Any thread may call it. Raises an
        `api.ServerError`."""
        return self._ask(url, path, self._member(url).server.post(path, body, timeout), timeout)

    def model_info(self, url: str, timeout: float = INFO_SECONDS) -> dict[str, Any]:
        """What the server at `url` says of its model. Raises an `api.ServerError`."""
        return self._ask(url, "/model_info", self._member(url).server.model_info(timeout), timeout)

    def server_info(self, url: str, timeout: float = INFO_SECONDS) -> dict[str, Any]:
        """The arguments and the state of the server at `url`. Raises an `api.ServerError`."""
        return self._ask(url, "/server_info", self._member(url).server.server_info(timeout), timeout)

    def _ask(self, url: str, path: str, question: Coroutine[Any, Any, T], timeout: float) -> T:
        try:
            return self._loop.run(question, f"asking {url} for {path}", timeout)
        except RolloutError as error:
            raise ServerLate(url, f"did not answer {path} in time") from error

    @property
    def counters(self) -> Counters:
        return replace(self._dispatcher.counters)

    @property
    def no_healthy_server_since(self) -> float | None:
        """The `time.monotonic()` since which samples have waited without a server that may serve; None: they do not."""
        return self._dispatcher.no_healthy_server_since

    # ------------------------------------------------------------------ samples

    def submit(self, requests: Sequence[SampleRequest]) -> None:
        """Ask for samples; returns at once. Raises ValueError if a key is pending already."""
        keys = {request.key for request in requests}
        if len(keys) < len(requests) or not self._pending.isdisjoint(keys):
            raise ValueError("a sample's key must be unique among those pending")
        self._pending |= keys

        async def submit() -> None:
            self._dispatcher.submit(requests)

        self._loop.run(submit(), f"submitting {len(requests)} samples")

    def listen(self, listener: Callable[[SampleResult], None]) -> None:
        """Tell `listener` of every finished sample, before `wait` returns it; in the event loop's thread, so it has to
        return at once. Not of those that `abort` returns."""
        self._listener = listener

    @property
    def pending(self) -> int:
        """Samples submitted and not yet returned by `wait` or `abort`."""
        return len(self._pending)

    def wait(self, timeout: float) -> list[SampleResult]:
        """The finished samples, as soon as there is one; [] after `timeout` seconds or when nothing is pending."""
        deadline = time.monotonic() + timeout
        with self._news:
            while not self._finished and self._error is None and self._pending:
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                self._news.wait(left)
            if self._error is not None:
                raise self._error
            return self._take()

    def abort(self, keep_partial: bool, patience: float = ABORT_PATIENCE) -> list[SampleResult]:
        """Give up everything pending, in the servers too. Returns [] or, with `keep_partial`, one result for each
        pending sample: finished, or an abort with what there is of it after `patience` seconds (maybe nothing)."""
        partial = self._loop.run(self._dispatcher.abort(keep_partial, patience), "aborting samples", patience)
        with self._news:
            self._error = None
            finished = [*self._take(), *partial]
        self._pending.clear()
        return finished if keep_partial else []

    def _take(self) -> list[SampleResult]:
        finished, self._finished = self._finished, []
        self._pending -= {result.key for result in finished}
        return finished

    def _deliver(self, result: SampleResult) -> None:
        self._listener(result)
        with self._news:
            self._finished.append(result)
            self._news.notify_all()

    def _refuse(self, error: Exception) -> None:
        with self._news:
            self._error = error
            self._news.notify_all()

    # ------------------------------------------------------------------ end

    def _member(self, url: str) -> Member:
        return self._members[url.rstrip("/")]

    def close(self) -> None:
        """Drop what is pending and every connection. The servers are left as they are. Safe to call twice."""
        self._pending.clear()
        session: aiohttp.ClientSession | None = getattr(self, "_session", None)
        self._loop.close(None if session is None else session.close())

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _view(m: Member) -> ServerView:
    return ServerView(
        m.url, m.healthy, m.label, m.in_flight, m.reason, m.reported, m.version, m.tensor_parallel, m.probed
    )


async def _open_session() -> aiohttp.ClientSession:
    return new_session()  # inside the loop that uses it


def _check(urls: Sequence[str], router_url: str | None) -> None:
    every = [*urls, *([] if router_url is None else [router_url])]
    wrong = [url for url in every if not url.startswith(("http://", "https://"))]
    if wrong or not urls:
        raise UserError(
            f"rollout servers need URLs such as http://127.0.0.1:30000, got {', '.join(map(repr, wrong)) or 'none'}"
        )
    if len({url.rstrip("/") for url in every}) < len(every):
        raise UserError(f"each rollout server must be named once: {', '.join(every)}")

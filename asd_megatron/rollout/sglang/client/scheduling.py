"""The schedule that decides which sample goes to which server next. No clock and no network."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from asd_megatron.records import equal_fields
from asd_megatron.rollout.sglang.client.routing import Routing

if TYPE_CHECKING:
    from asd_megatron.records import TokenIds


@dataclass(frozen=True)
class SampleRequest:
    """One sample to generate. `key` is the caller's name for it, unique among what is pending; samples of one `group`
    share a prefix and go to one server; `sampling` is SGLang's `sampling_params`. With `routing`, the model's, the
    server is asked for the routed experts too.
    """

    key: Hashable
    group: Hashable
    input_ids: tuple[int, ...]
    sampling: Mapping[str, Any]
    routing: Routing | None = None


@dataclass(frozen=True, eq=False)
class SampleResult:
    """The outcome of a `SampleRequest`.

    `finish_reason` is stop, length or abort (given up, or aborted by the caller: the tokens so far, possibly none).
    `output_ids`: int32; `logprobs[t]` (float32) is the log-probability of `output_ids[t]` after temperature, before
    top-p and top-k. `spans`: (start, label), ascending: from output position `start` on the weights were `label`.
    `url`: the server (or router) that answered, "" if none did. `attempts`: how often the request was sent.
    `routed_experts`: int16 [input and output tokens - 1, layers, experts of a token], or None with the reason in
    `unrouted` if they were asked for.
    """

    key: Hashable
    output_ids: TokenIds = field(default_factory=lambda: np.zeros(0, dtype=np.int32))
    logprobs: np.ndarray[Any, np.dtype[np.float32]] = field(default_factory=lambda: np.zeros(0, dtype=np.float32))
    finish_reason: str = "abort"
    spans: tuple[tuple[int, str], ...] = ()
    url: str = ""
    attempts: int = 0
    routed_experts: np.ndarray[Any, Any] | None = field(default=None, compare=False, repr=False)
    unrouted: str = ""

    __eq__ = equal_fields


@dataclass(eq=False)
class PendingSample:
    """A request that has no result yet. `failed_at` is the endpoint of its last failure; `busy` counts the seconds for
    which busy servers have delayed it."""

    request: SampleRequest
    attempts: int = 0
    failures: int = 0
    failed_at: Endpoint | None = None
    busy: float = 0.0


@dataclass(eq=False)
class Endpoint:
    """Where requests can be sent: a server, or the router. At most `limit` at a time, and none unless `open`."""

    url: str
    limit: int
    open: bool = False
    in_flight: int = 0
    queue: deque[PendingSample] = field(default_factory=deque)

    @property
    def free(self) -> bool:
        return self.open and self.in_flight < self.limit


class Schedule:
    """Waiting samples, and the endpoints that they can be sent to.

    A group is placed on one endpoint, the one with the fewest requests in flight when the group's turn comes, groups in
    submitted order. An endpoint is given its next group only after all samples of the last one have been sent, so that
    no endpoint hoards. With an open `router` samples are sent there one by one, and the router places them. A failed
    sample is sent directly to another endpoint than the one where it failed, or to that one if no other is open. The
    caller counts `in_flight` and opens endpoints.

    Example: two servers with limit 2, groups a, b, c of 3 samples: a0 a1 go to the first, b0 b1 to the second; a2 and
    b2 stay in the queues of their servers; c waits until one of the two queues is empty.
    """

    def __init__(self, endpoints: Sequence[Endpoint], router: Endpoint | None = None) -> None:
        self._endpoints = list(endpoints)
        self._router = router
        self._groups: OrderedDict[Hashable, deque[PendingSample]] = OrderedDict()  # not placed yet
        self._retries: deque[PendingSample] = deque()

    def add(self, samples: Iterable[PendingSample]) -> None:
        """New samples, behind all others."""
        for sample in samples:
            self._groups.setdefault(sample.request.group, deque()).append(sample)

    def put_back(self, samples: Sequence[PendingSample]) -> None:
        """Samples that lost their endpoint without having failed, before all others."""
        for sample in reversed(samples):
            group = sample.request.group
            self._groups.setdefault(group, deque()).appendleft(sample)
            self._groups.move_to_end(group, last=False)

    def retry(self, sample: PendingSample) -> None:
        """A sample that failed at `sample.failed_at`: the next one to be sent, elsewhere if possible."""
        self._retries.append(sample)

    def close(self, endpoint: Endpoint) -> None:
        """Nothing more is sent to the endpoint; what is in its queue is placed again."""
        endpoint.open = False
        waiting, endpoint.queue = list(endpoint.queue), deque()
        self.put_back(waiting)

    def drop(self) -> None:
        """Forget everything that waits."""
        self._groups.clear()
        self._retries.clear()
        for endpoint in self._endpoints:
            endpoint.queue.clear()

    def next(self) -> tuple[PendingSample, Endpoint] | None:
        """The next sample that can be sent, with its endpoint, or None. The caller sends it: it waits no longer."""
        return self._next_retry() or self._next_routed() or self._next_placed()

    def _next_retry(self) -> tuple[PendingSample, Endpoint] | None:
        open_endpoints = [endpoint for endpoint in self._endpoints if endpoint.open]
        if not any(endpoint.free for endpoint in open_endpoints):
            return None
        for position, sample in enumerate(self._retries):
            elsewhere = [e for e in open_endpoints if e is not sample.failed_at] or open_endpoints
            free = [endpoint for endpoint in elsewhere if endpoint.free]
            if free:
                del self._retries[position]
                return sample, min(free, key=lambda endpoint: endpoint.in_flight)
        return None

    def _next_routed(self) -> tuple[PendingSample, Endpoint] | None:
        if self._router is None or not self._router.free or not self._groups:
            return None
        return self._first_waiting(), self._router

    def _next_placed(self) -> tuple[PendingSample, Endpoint] | None:
        free = [endpoint for endpoint in self._endpoints if endpoint.free]
        for endpoint in sorted(free, key=lambda endpoint: endpoint.in_flight):
            if endpoint.queue:
                return endpoint.queue.popleft(), endpoint
            if self._groups and not (self._router and self._router.open):
                _, endpoint.queue = self._groups.popitem(last=False)
                return endpoint.queue.popleft(), endpoint
        return None

    def _first_waiting(self) -> PendingSample:
        group, waiting = next(iter(self._groups.items()))
        sample = waiting.popleft()
        if not waiting:
            del self._groups[group]
        return sample

"""Which sample goes to which server next. Plain bookkeeping: no clock, no network."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class SampleRequest:
    """One sample to be made. `key` is the caller's name for it, unique among what is pending; samples of one `group`
    share a prefix and go to one server; `sampling` is SGLang's `sampling_params`.
    """

    key: Hashable
    group: Hashable
    input_ids: tuple[int, ...]
    sampling: Mapping[str, Any]


@dataclass(frozen=True)
class SampleResult:
    """What became of a sample.

    `finish_reason` is stop, length or abort (given up, or called off: whatever there is of it, possibly nothing).
    `logprobs[t]` is the log-probability of `output_ids[t]` after temperature, before top-p and top-k. `spans`: (start,
    label), ascending: from output position `start` on the weights were `label`. `url` made it, "" if nobody did.
    `attempts`: how often it was begun.
    """

    key: Hashable
    output_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    finish_reason: str = "abort"
    spans: tuple[tuple[int, str], ...] = ()
    url: str = ""
    attempts: int = 0


@dataclass(eq=False)
class Ticket:
    """A sample on its way. `failed_at` is the lane of its last failure; `busy` counts seconds of being put off."""

    request: SampleRequest
    attempts: int = 0
    failures: int = 0
    failed_at: Lane | None = None
    busy: float = 0.0


@dataclass(eq=False)
class Lane:
    """Where samples can go: a server, or the router. At most `limit` of them at a time, and none unless `open`."""

    url: str
    limit: int
    open: bool = False
    in_flight: int = 0
    queue: deque[Ticket] = field(default_factory=deque)

    @property
    def free(self) -> bool:
        return self.open and self.in_flight < self.limit


class Schedule:
    """Samples that wait, and the lanes they may take.

    A group goes whole to the lane that is least loaded when the group's turn comes, groups in submitted order; a lane
    takes another group only when it has begun the last one, so none hoards. With an open `router` samples go there one
    by one, for the router to place. A sample that failed goes directly to another lane than the one where it failed, or
    to that one when it is the only one open. The caller counts `in_flight` and opens lanes.
    """

    def __init__(self, lanes: Sequence[Lane], router: Lane | None = None) -> None:
        self._lanes = list(lanes)
        self._router = router
        self._groups: OrderedDict[Hashable, deque[Ticket]] = OrderedDict()  # not placed yet
        self._retries: deque[Ticket] = deque()

    def add(self, tickets: Iterable[Ticket]) -> None:
        """New samples, behind all others."""
        for ticket in tickets:
            self._groups.setdefault(ticket.request.group, deque()).append(ticket)

    def put_back(self, tickets: Sequence[Ticket]) -> None:
        """Samples that were placed and lost their place through no fault of theirs, before all others."""
        for ticket in reversed(tickets):
            group = ticket.request.group
            self._groups.setdefault(group, deque()).appendleft(ticket)
            self._groups.move_to_end(group, last=False)

    def retry(self, ticket: Ticket) -> None:
        """A sample that failed at `ticket.failed_at`: the next one to go, elsewhere if possible."""
        self._retries.append(ticket)

    def close(self, lane: Lane) -> None:
        """Nothing more goes to the lane; what waited for it goes elsewhere."""
        lane.open = False
        waiting, lane.queue = list(lane.queue), deque()
        self.put_back(waiting)

    def drop(self) -> None:
        """Forget everything that waits."""
        self._groups.clear()
        self._retries.clear()
        for lane in self._lanes:
            lane.queue.clear()

    def next(self) -> tuple[Ticket, Lane] | None:
        """The next sample that can go, with its lane, or None. It waits no longer: the caller sends it."""
        return self._next_retry() or self._next_routed() or self._next_placed()

    def _next_retry(self) -> tuple[Ticket, Lane] | None:
        open_lanes = [lane for lane in self._lanes if lane.open]
        if not any(lane.free for lane in open_lanes):
            return None
        for position, ticket in enumerate(self._retries):
            elsewhere = [lane for lane in open_lanes if lane is not ticket.failed_at] or open_lanes
            free = [lane for lane in elsewhere if lane.free]
            if free:
                del self._retries[position]
                return ticket, min(free, key=lambda lane: lane.in_flight)
        return None

    def _next_routed(self) -> tuple[Ticket, Lane] | None:
        if self._router is None or not self._router.free or not self._groups:
            return None
        return self._first_waiting(), self._router

    def _next_placed(self) -> tuple[Ticket, Lane] | None:
        free = [lane for lane in self._lanes if lane.free]
        for lane in sorted(free, key=lambda lane: lane.in_flight):
            if lane.queue:
                return lane.queue.popleft(), lane
            if self._groups and not (self._router and self._router.open):
                _, lane.queue = self._groups.popitem(last=False)
                return lane.queue.popleft(), lane
        return None

    def _first_waiting(self) -> Ticket:
        group, waiting = next(iter(self._groups.items()))
        ticket = waiting.popleft()
        if not waiting:
            del self._groups[group]
        return ticket

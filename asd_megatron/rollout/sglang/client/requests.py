"""What happens to samples between being asked for and being delivered, inside one event loop.

A sample is delivered exactly once: as a whole answer made under weights that its server was admitted with, or as an
abort after too many failures. Whatever goes wrong with an attempt, the sample is made again, elsewhere if possible.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from asd_megatron.rollout.sglang.client.api import (
    INCOMPLETE,
    Generation,
    InvalidAnswer,
    ServerBusy,
    ServerDown,
    SGLangServer,
)
from asd_megatron.rollout.sglang.client.scheduling import Lane, SampleRequest, SampleResult, Schedule, Ticket

FAILURES_TO_EJECT = 2
LONGEST_PAUSE = 5.0  # seconds between two attempts at the same sample
ABORT_SECONDS = 5.0  # an abort request is answered within this or not at all


@dataclass
class Counters:
    """What did not go straight since the start."""

    retried: int = 0  # attempts that were made again
    ejected: int = 0  # healthy servers that stopped being so
    returned: int = 0  # servers that became healthy again
    stale_answers: int = 0  # answers made under other weights than those admitted
    given_up: int = 0  # samples delivered as aborted after too many failures
    deadline: int = 0  # attempts that took longer than the request's time limit


@dataclass(eq=False, kw_only=True)
class Member(Lane):
    """A server (or the router) with what is known of it.

    `label`: the weights it was admitted with; None: it may not serve. `withdrawn`: the caller took it out, perhaps with
    its generation paused, so that it is asked for no token. `reported`: the label that the server itself gives.
    """

    server: SGLangServer
    healthy: bool = False
    known: bool = False  # has been healthy before
    label: str | None = None
    reason: str = "not asked yet"
    withdrawn: bool = False
    failures: int = 0  # in a row
    missed: int = 0  # probes in a row without an answer
    reported: str = ""
    version: str = ""
    tensor_parallel: int = 1
    started: object = None  # differs from one life of the server to the next
    wake: asyncio.Event = field(default_factory=asyncio.Event)  # ask it now


@dataclass(eq=False)
class Attempt:
    """One try at a sample. `labels`: what its member was admitted with since it began; `across`: more than at first."""

    ticket: Ticket
    member: Member
    labels: set[str]
    across: bool = False
    task: asyncio.Task[None] | None = None
    deadline: asyncio.Timeout | None = None
    left: float | None = None  # seconds of its time limit, while the clock stands


class Attempts:
    """Sends samples to admitted servers, at most `Lane.limit` each, and judges the answers.

    Methods are called in the event loop and return at once (`abort` excepted). `deliver` gets every result, `refuse`
    the first request that a server refused for good: from then on nothing is sent until `abort`.
    """

    def __init__(
        self,
        members: Sequence[Member],
        router: Member | None,
        *,
        request_timeout: float,
        retries: int,
        deliver: Callable[[SampleResult], None],
        refuse: Callable[[Exception], None],
    ) -> None:
        self.members = members
        self.router = router
        self.counters = Counters()
        self.stranded_since: float | None = None
        self._schedule = Schedule(members, router)
        self._timeout = request_timeout
        self._retries = retries
        self._deliver = deliver
        self._refuse = refuse
        self._unfinished: set[Ticket] = set()
        self._running: dict[Ticket, Attempt] = {}
        self._put_off: dict[Ticket, asyncio.TimerHandle] = {}
        self._early: list[tuple[Attempt, Generation]] = []  # answers under the announced label, before it is admitted
        self._updates: list[str] = []  # labels of the updates under way, one within the other
        self._refused = False
        self._called_off: dict[Ticket, SampleResult] | None = None  # partial results, while an abort is under way

    def submit(self, requests: Iterable[SampleRequest]) -> None:
        tickets = [Ticket(request) for request in requests]
        self._unfinished.update(tickets)
        self._schedule.add(tickets)
        self._advance()

    # ------------------------------------------------------------------ servers come and go

    def admit(self, member: Member, label: str) -> None:
        """It has exactly these weights and serves from now on; what runs there goes on."""
        member.healthy = member.known = member.open = True
        member.label = member.reported = label
        member.withdrawn, member.failures, member.reason = False, 0, ""
        for attempt in self._running.values():
            if attempt.member in (member, self.router) and label not in attempt.labels:
                attempt.labels.add(label)
                attempt.across = True
        self._judge_early()
        self._advance()

    def withdraw(self, member: Member, reason: str) -> None:
        """It may not serve; what runs there is made again elsewhere, at no cost to the samples."""
        member.label, member.reason, member.withdrawn = None, reason, True
        self._take_back(member, failed=False)

    def eject(self, member: Member, reason: str) -> None:
        """It does not work; what runs there is made again elsewhere."""
        self.counters.ejected += member.healthy
        member.healthy, member.label, member.reason, member.failures = False, None, reason, 0
        self._take_back(member, failed=True)

    def welcome(self, member: Member) -> None:
        """It works (again). A router serves at once, a server once it is admitted."""
        self.counters.returned += member.known and not member.healthy
        member.healthy = member.known = True
        if not member.withdrawn and member.label is None:
            member.reason = "" if member is self.router else "waits for weights"
        self._advance()

    def _take_back(self, member: Member, failed: bool) -> None:
        self._schedule.close(member)
        lost = [attempt for attempt in self._running.values() if attempt.member is member]
        unharmed = []
        for attempt in lost:
            self._end(attempt)
            if attempt.task is not None:
                attempt.task.cancel()
            if failed:
                self._again(attempt)
            else:
                unharmed.append(attempt.ticket)
        if self._called_off is None:
            self.counters.retried += len(unharmed)
            self._schedule.put_back(unharmed)
        self._advance()

    # ------------------------------------------------------------------ a weight update

    @property
    def _announced(self) -> str | None:
        return self._updates[-1] if self._updates else None

    def hold(self, label: str) -> None:
        """Weights are about to change: nothing is sent, no time limit runs. Answers under `label` wait until their
        server is admitted with it. Holds may be nested."""
        self._updates.append(label)
        now = asyncio.get_running_loop().time()
        for attempt in self._running.values():
            if attempt.deadline is not None and (when := attempt.deadline.when()) and not attempt.deadline.expired():
                attempt.left = when - now
                attempt.deadline.reschedule(None)

    def release(self) -> None:
        self._updates.pop()
        now = asyncio.get_running_loop().time()
        for attempt in self._running.values():
            if not self._updates and attempt.deadline is not None and attempt.deadline.when() is None:
                attempt.deadline.reschedule(now + (self._timeout if attempt.left is None else attempt.left))
        self._judge_early()
        self._advance()

    # ------------------------------------------------------------------ sending

    def _advance(self) -> None:
        if self.router is not None:
            serving = [member for member in self.members if member.open]
            self.router.limit = sum(member.limit for member in serving)
            if self.router.open and not (serving and self.router.healthy):
                self._schedule.close(self.router)
            self.router.open = bool(serving) and self.router.healthy
        while not self._updates and not self._refused and self._called_off is None and (move := self._schedule.next()):
            self._send(*move)
        waiting = bool(self._unfinished) and not any(member.open for member in self.members)
        self.stranded_since = (self.stranded_since or time.monotonic()) if waiting else None

    def _send(self, ticket: Ticket, lane: Lane) -> None:
        assert isinstance(lane, Member)
        admitted = self.members if lane is self.router else (lane,)
        attempt = Attempt(ticket, lane, {member.label for member in admitted if member.label is not None})
        ticket.attempts += 1
        lane.in_flight += 1
        self._running[ticket] = attempt
        attempt.task = asyncio.create_task(self._make(attempt))

    async def _make(self, attempt: Attempt) -> None:
        request = attempt.ticket.request
        try:
            async with asyncio.timeout(None if self._updates else self._timeout) as attempt.deadline:
                answer = await attempt.member.server.generate(request.input_ids, request.sampling)
        except TimeoutError:
            self.counters.deadline += 1
            self._fail(attempt, f"did not finish a sample within {self._timeout:g} s")
        except ServerBusy as error:
            self._postpone(attempt, error.what)
        except (ServerDown, InvalidAnswer) as error:
            self._fail(attempt, error.what)
        except Exception as error:
            self._stop_at(attempt, error)
        else:
            attempt.deadline = None
            self._receive(attempt, answer)

    # ------------------------------------------------------------------ judging

    def _judge_early(self) -> None:
        early, self._early = self._early, []
        for attempt, answer in early:
            self._receive(attempt, answer)

    def _receive(self, attempt: Attempt, answer: Generation) -> None:
        if self._announced == answer.label and answer.label not in attempt.labels:
            self._early.append((attempt, answer))
        else:
            self._judge(attempt, answer)

    def _judge(self, attempt: Attempt, answer: Generation) -> None:
        if self._running.get(attempt.ticket) is not attempt:
            return
        if (wrong := _wrong_label(attempt, answer)) is not None:
            self.counters.stale_answers += 1
            self._fail(attempt, f"answered under the weights {wrong!r}, not {' or '.join(sorted(attempt.labels))!r}")
        elif answer.finish_reason == "abort" and self._called_off is None:
            self._fail(attempt, "aborted a sample unasked")
        else:
            self._end(attempt)
            attempt.member.failures = 0
            self._finish(attempt.ticket, _result(attempt, answer))
            self._advance()

    def _finish(self, ticket: Ticket, result: SampleResult) -> None:
        self._unfinished.discard(ticket)
        if self._called_off is None:
            self._deliver(result)
        else:
            self._called_off[ticket] = result

    def _fail(self, attempt: Attempt, reason: str) -> None:
        if not self._end(attempt):
            return
        member = attempt.member
        if member is not self.router:  # a router is not to blame for what stands behind it: its probe decides
            member.failures += 1
            if member.failures >= FAILURES_TO_EJECT:
                self.eject(member, reason)
        member.wake.set()
        self._again(attempt)
        self._advance()

    def _again(self, attempt: Attempt) -> None:
        ticket = attempt.ticket
        ticket.failures += 1
        ticket.failed_at = attempt.member
        if self._called_off is not None:
            return
        if ticket.failures > self._retries:
            self.counters.given_up += 1
            self._finish(ticket, SampleResult(ticket.request.key, attempts=ticket.attempts))
            return
        self.counters.retried += 1
        self._later(ticket, 0.1 * 2 ** (ticket.failures - 1), self._schedule.retry)

    def _postpone(self, attempt: Attempt, reason: str) -> None:
        """Busy is no failure, until it has lasted as long as a sample may."""
        ticket = attempt.ticket
        if ticket.busy > self._timeout:
            ticket.busy = 0.0
            self._fail(attempt, reason)
        elif self._end(attempt) and self._called_off is None:
            pause = min(max(0.1, ticket.busy), LONGEST_PAUSE)
            ticket.busy += pause
            self._later(ticket, pause, lambda waiting: self._schedule.put_back([waiting]))

    def _later(self, ticket: Ticket, seconds: float, back: Callable[[Ticket], None]) -> None:
        def due() -> None:
            del self._put_off[ticket]
            back(ticket)
            self._advance()

        loop = asyncio.get_running_loop()
        self._put_off[ticket] = loop.call_later(min(seconds, LONGEST_PAUSE), due)

    def _stop_at(self, attempt: Attempt, error: Exception) -> None:
        """Refused, or a bug: the next sample would meet the same."""
        if self._end(attempt) and not self._refused:
            self._refused = True
            self._refuse(error)

    def _end(self, attempt: Attempt) -> bool:
        """The attempt is over. False if it was over before."""
        if self._running.get(attempt.ticket) is not attempt:
            return False
        del self._running[attempt.ticket]
        attempt.member.in_flight -= 1
        return True

    # ------------------------------------------------------------------ calling off

    async def abort(self, keep_partial: bool, patience: float) -> list[SampleResult]:
        """Give up everything unfinished; with `keep_partial` one result for each of them, with what there was of it
        after at most `patience` seconds."""
        self._called_off = {}
        self._schedule.drop()
        for timer in self._put_off.values():
            timer.cancel()
        self._put_off.clear()
        unfinished = list(self._unfinished)
        tasks = [attempt.task for attempt in self._running.values() if attempt.task is not None]
        deadline = time.monotonic() + (patience if keep_partial else 0.0)
        if tasks:
            await self._stop_servers()
        while keep_partial and tasks and (left := deadline - time.monotonic()) > 0:
            _, waiting = await asyncio.wait(tasks, timeout=min(left, 0.5))
            tasks = list(waiting)
            if tasks:  # a request may have been on its way to the scheduler when all others were aborted
                await self._stop_servers()
        for attempt in list(self._running.values()):
            self._end(attempt)
            if attempt.task is not None:
                attempt.task.cancel()
        results, self._called_off = self._called_off, None
        self._unfinished.clear()
        self._early.clear()
        self._refused = False
        self._advance()
        if not keep_partial:
            return []
        return [results.get(t, SampleResult(t.request.key, attempts=t.attempts)) for t in unfinished]

    async def _stop_servers(self) -> None:
        stops = [
            member.server.post("/abort_request", {"abort_all": True}, ABORT_SECONDS)
            for member in self.members
            if member.healthy
        ]
        await asyncio.gather(*stops, return_exceptions=True)


def _wrong_label(attempt: Attempt, answer: Generation) -> str | None:
    """The first label of the answer that its server was not admitted with, or None. An answer without spans that could
    have been made across two versions counts as wrong."""
    if not answer.spans and attempt.across:
        return answer.label
    labels = [label for _, label in answer.spans] or [answer.label]
    return next((label for label in labels if label.endswith(INCOMPLETE) or label not in attempt.labels), None)


def _result(attempt: Attempt, answer: Generation) -> SampleResult:
    ticket = attempt.ticket
    return SampleResult(
        ticket.request.key,
        answer.output_ids,
        answer.logprobs,
        answer.finish_reason,
        answer.spans or (((0, answer.label),) if answer.output_ids else ()),
        attempt.member.url,
        ticket.attempts,
    )

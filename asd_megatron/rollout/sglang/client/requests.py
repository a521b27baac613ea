"""The dispatcher: sends samples to servers and checks the answers, inside one event loop.

A sample is delivered exactly once: as a complete answer generated under weights that its server was admitted with, or
as an abort after too many failures. A failed attempt is retried, on another server if possible.
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
from asd_megatron.rollout.sglang.client.scheduling import (
    Endpoint,
    PendingSample,
    SampleRequest,
    SampleResult,
    Schedule,
)

FAILURES_UNTIL_UNHEALTHY = 2
FIRST_PAUSE = 0.1  # seconds between the first two attempts at a sample; doubled with every further failure
LONGEST_PAUSE = 5.0
ABORT_SECONDS = 5.0  # an abort request is answered within this or not at all


@dataclass
class Counters:
    """Failure counters since the start."""

    retried: int = 0  # attempts that were retried
    ejected: int = 0  # servers that became unhealthy
    returned: int = 0  # servers that became healthy again
    stale_answers: int = 0  # answers generated under other weights than those admitted
    given_up: int = 0  # samples delivered as aborted after too many failures
    deadline: int = 0  # attempts that exceeded the request's time limit


@dataclass(eq=False, kw_only=True)
class Member(Endpoint):
    """A server (or the router) and its state.

    `label`: the weights it was admitted with; None: it may not serve. `withdrawn`: the caller withdrew it, perhaps with
    its generation paused, so its health is probed without generating. `reported`: the label that the server itself
    gives.
    """

    server: SGLangServer
    healthy: bool = False
    known: bool = False  # has been healthy before
    label: str | None = None
    reason: str = "not probed yet"  # why it does not serve
    withdrawn: bool = False
    failures: int = 0  # in a row
    missed: int = 0  # probes in a row without an answer
    probed: float = 0.0  # `time.monotonic()` of the last probe that found it healthy
    reported: str = ""
    version: str = ""
    tensor_parallel: int = 1
    started: object = None  # the server's start time: changes when it is restarted
    wake: asyncio.Event = field(default_factory=asyncio.Event)  # probe it now


@dataclass(eq=False)
class Attempt:
    """One request sent for a sample. `labels`: what its member has been admitted with since then; `across`: more than
    at first."""

    sample: PendingSample
    member: Member
    labels: set[str]
    across: bool = False
    task: asyncio.Task[None] | None = None
    deadline: asyncio.Timeout | None = None
    left: float | None = None  # seconds of its time limit, while the clock is stopped


class Dispatcher:
    """Sends samples to admitted servers, at most `Endpoint.limit` at a time to each, and checks the answers.

    Methods are called in the event loop and return at once (`abort` excepted). `deliver` gets every result, `refuse`
    the error of the first request that a server refused for good: from then on nothing is sent until `abort`.
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
        self.no_healthy_server_since: float | None = None
        self._schedule = Schedule(members, router)
        self._timeout = request_timeout
        self._retries = retries
        self._deliver = deliver
        self._refuse = refuse
        self._unfinished: set[PendingSample] = set()
        self._running: dict[PendingSample, Attempt] = {}
        self._delayed: dict[PendingSample, asyncio.TimerHandle] = {}
        self._early: list[tuple[Attempt, Generation]] = []  # answers under the announced label, before it is admitted
        self._holds: list[str | None] = []  # labels of the updates in progress, one within the other; None: no update
        self._refused = False
        self._aborting: dict[PendingSample, SampleResult] | None = None  # partial results, while an abort is running

    def submit(self, requests: Iterable[SampleRequest]) -> None:
        samples = [PendingSample(request) for request in requests]
        self._unfinished.update(samples)
        self._schedule.add(samples)
        self._advance()

    # ------------------------------------------------------------------ state of the servers

    def admit(self, member: Member, label: str) -> None:
        """The server has exactly the weights `label` and serves from now on; its running requests continue."""
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
        """The server may not serve; its running requests are sent elsewhere without counting as failures."""
        member.label, member.reason, member.withdrawn = None, reason, True
        self._take_back(member, failed=False)

    def mark_unhealthy(self, member: Member, reason: str) -> None:
        """The server does not work; its running requests have failed and are retried elsewhere."""
        self.counters.ejected += member.healthy
        member.healthy, member.label, member.reason, member.failures = False, None, reason, 0
        self._take_back(member, failed=True)

    def mark_healthy(self, member: Member) -> None:
        """The server or router works (again). A router serves at once, a server once it is admitted."""
        self.counters.returned += member.known and not member.healthy
        member.healthy = member.known = True
        member.probed = time.monotonic()
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
                self._retry(attempt)
            else:
                unharmed.append(attempt.sample)
        if self._aborting is None:
            self.counters.retried += len(unharmed)
            self._schedule.put_back(unharmed)
        self._advance()

    # ------------------------------------------------------------------ holds

    @property
    def _announced(self) -> str | None:
        return self._holds[-1] if self._holds else None

    def hold(self, label: str | None) -> None:
        """Until `release`, nothing is sent and no time limit runs. `label`: the weights are about to change to it, and
        answers under it wait until their server is admitted. Holds may be nested."""
        self._holds.append(label)
        now = asyncio.get_running_loop().time()
        for attempt in self._running.values():
            if attempt.deadline is not None and (when := attempt.deadline.when()) and not attempt.deadline.expired():
                attempt.left = when - now
                attempt.deadline.reschedule(None)

    def release(self) -> None:
        self._holds.pop()
        now = asyncio.get_running_loop().time()
        for attempt in self._running.values():
            if not self._holds and attempt.deadline is not None and attempt.deadline.when() is None:
                attempt.deadline.reschedule(now + (self._timeout if attempt.left is None else attempt.left))
        self._judge_early()
        self._advance()

    # ------------------------------------------------------------------ sending

    def _advance(self) -> None:
        """Send everything that can be sent now. Called after every change of state."""
        if self.router is not None:
            serving = [member for member in self.members if member.open]
            self.router.limit = sum(member.limit for member in serving)
            if self.router.open and not (serving and self.router.healthy):
                self._schedule.close(self.router)
            self.router.open = bool(serving) and self.router.healthy
        while not self._holds and not self._refused and self._aborting is None and (move := self._schedule.next()):
            self._send(*move)
        waiting = bool(self._unfinished) and not any(member.open for member in self.members)
        self.no_healthy_server_since = (self.no_healthy_server_since or time.monotonic()) if waiting else None

    def _send(self, sample: PendingSample, endpoint: Endpoint) -> None:
        assert isinstance(endpoint, Member)
        admitted = self.members if endpoint is self.router else (endpoint,)
        attempt = Attempt(sample, endpoint, {member.label for member in admitted if member.label is not None})
        sample.attempts += 1
        endpoint.in_flight += 1
        self._running[sample] = attempt
        attempt.task = asyncio.create_task(self._run(attempt))

    async def _run(self, attempt: Attempt) -> None:
        request = attempt.sample.request
        try:
            async with asyncio.timeout(None if self._holds else self._timeout) as attempt.deadline:
                answer = await attempt.member.server.generate(request.input_ids, request.sampling, request.routing)
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
        if self._running.get(attempt.sample) is not attempt:
            return
        if (wrong := _wrong_label(attempt, answer)) is not None:
            self.counters.stale_answers += 1
            self._fail(attempt, f"answered under the weights {wrong!r}, not {' or '.join(sorted(attempt.labels))!r}")
        elif answer.finish_reason == "abort" and self._aborting is None:
            self._fail(attempt, "aborted a sample without being asked to")
        else:
            self._end(attempt)
            attempt.member.failures = 0
            self._finish(attempt.sample, _result(attempt, answer))
            self._advance()

    def _finish(self, sample: PendingSample, result: SampleResult) -> None:
        self._unfinished.discard(sample)
        if self._aborting is None:
            self._deliver(result)
        else:
            self._aborting[sample] = result

    def _fail(self, attempt: Attempt, reason: str) -> None:
        if not self._end(attempt):
            return
        member = attempt.member
        if member is not self.router:  # a failure behind the router is not the router's: its probe decides
            member.failures += 1
            if member.failures >= FAILURES_UNTIL_UNHEALTHY:
                self.mark_unhealthy(member, reason)
        member.wake.set()
        self._retry(attempt)
        self._advance()

    def _retry(self, attempt: Attempt) -> None:
        sample = attempt.sample
        sample.failures += 1
        sample.failed_at = attempt.member
        if self._aborting is not None:
            return
        if sample.failures > self._retries:
            self.counters.given_up += 1
            self._finish(sample, SampleResult(sample.request.key, attempts=sample.attempts))
            return
        self.counters.retried += 1
        self._delay(sample, FIRST_PAUSE * 2 ** (sample.failures - 1), self._schedule.retry)

    def _postpone(self, attempt: Attempt, reason: str) -> None:
        """A busy server is no failure, until it has been busy for as long as a sample may take."""
        sample = attempt.sample
        if sample.busy > self._timeout:
            sample.busy = 0.0
            self._fail(attempt, reason)
        elif self._end(attempt) and self._aborting is None:
            pause = min(max(FIRST_PAUSE, sample.busy), LONGEST_PAUSE)
            sample.busy += pause
            self._delay(sample, pause, lambda waiting: self._schedule.put_back([waiting]))

    def _delay(self, sample: PendingSample, seconds: float, then: Callable[[PendingSample], None]) -> None:
        def due() -> None:
            del self._delayed[sample]
            then(sample)
            self._advance()

        loop = asyncio.get_running_loop()
        self._delayed[sample] = loop.call_later(min(seconds, LONGEST_PAUSE), due)

    def _stop_at(self, attempt: Attempt, error: Exception) -> None:
        """Refused for good, or a bug: the next sample would fail in the same way."""
        if self._end(attempt) and not self._refused:
            self._refused = True
            self._refuse(error)

    def _end(self, attempt: Attempt) -> bool:
        """The attempt is over. False if it was over before."""
        if self._running.get(attempt.sample) is not attempt:
            return False
        del self._running[attempt.sample]
        attempt.member.in_flight -= 1
        return True

    # ------------------------------------------------------------------ aborting

    async def abort(self, keep_partial: bool, patience: float) -> list[SampleResult]:
        """Give up everything unfinished; with `keep_partial` one result for each of them, with the tokens it has after
        at most `patience` seconds."""
        self._aborting = {}
        self._schedule.drop()
        for timer in self._delayed.values():
            timer.cancel()
        self._delayed.clear()
        unfinished = list(self._unfinished)
        tasks = [attempt.task for attempt in self._running.values() if attempt.task is not None]
        deadline = time.monotonic() + (patience if keep_partial else 0.0)
        if tasks:
            await self._abort_on_servers()
        while keep_partial and tasks and (left := deadline - time.monotonic()) > 0:
            _, waiting = await asyncio.wait(tasks, timeout=min(left, 0.5))
            tasks = list(waiting)
            if tasks:  # a request may have been on its way to the scheduler when all others were aborted
                await self._abort_on_servers()
        for attempt in list(self._running.values()):
            self._end(attempt)
            if attempt.task is not None:
                attempt.task.cancel()
        results, self._aborting = self._aborting, None
        self._unfinished.clear()
        self._early.clear()
        self._refused = False
        self._advance()
        if not keep_partial:
            return []
        return [results.get(s, SampleResult(s.request.key, attempts=s.attempts)) for s in unfinished]

    async def _abort_on_servers(self) -> None:
        aborts = [
            member.server.post("/abort_request", {"abort_all": True}, ABORT_SECONDS)
            for member in self.members
            if member.healthy
        ]
        await asyncio.gather(*aborts, return_exceptions=True)


def _wrong_label(attempt: Attempt, answer: Generation) -> str | None:
    """The first label of the answer that its server was not admitted with, or None. An answer without spans that could
    have been generated across two versions counts as wrong."""
    if not answer.spans and attempt.across:
        return answer.label
    labels = [label for _, label in answer.spans] or [answer.label]
    return next((label for label in labels if label.endswith(INCOMPLETE) or label not in attempt.labels), None)


def _result(attempt: Attempt, answer: Generation) -> SampleResult:
    sample = attempt.sample
    return SampleResult(
        sample.request.key,
        answer.output_ids,
        answer.logprobs,
        answer.finish_reason,
        answer.spans or (((0, answer.label),) if len(answer.output_ids) else ()),
        attempt.member.url,
        sample.attempts,
        answer.routed_experts,
        answer.unrouted,
    )

"""Rewards from a server: a judge, a remote verifier. The protocol is that of docs/rewards.md."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import aiohttp

from asd_megatron.distributed import activity
from asd_megatron.files import read_private
from asd_megatron.records import Problem
from asd_megatron.reward.base import Response, RewardError, new_counters

log = logging.getLogger(__name__)

CONNECT_SECONDS = 10.0
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0  # seconds between attempts: doubled each time, or what Retry-After asks for
MAX_ANSWER_BYTES = 16 << 20
MARK_SECONDS = 1.0
KEY = re.compile(r"[!-~]+")  # printable ASCII: it becomes a HTTP header
SETTINGS = (401, 403, 404, 405)  # a wrong key or URL: no response can be scored, whatever reward.on_error is


class _Failed(Exception):
    """A request got no rewards. `again`: another attempt may; `pause`: seconds that the server asks to wait."""

    def __init__(self, reason: str, *, again: bool, counter: str = "errors", pause: float | None = None) -> None:
        super().__init__(reason)
        self.again, self.counter, self.pause = again, counter, pause


@dataclass(frozen=True)
class Endpoint:
    """A server and how it is used; the fields are the keys of the section `reward.http`."""

    url: str
    key_file: str | None = None
    batch: int = 32
    concurrency: int = 4
    timeout_seconds: float = 120.0
    retries: int = 4
    environment_proxy: bool = False


class HttpVerifier:
    """Posts the responses to a server, in requests of `batch` responses and `concurrency` of them at a time.

    A request that fails by its connection, its time limit or a status 408, 429 or 5xx is sent again, `retries` times
    at most, after a pause that doubles or that `Retry-After` names (at most a minute). What then has no reward, and a
    null in the answer, is an error of those responses alone: with `on_error` `stop` it raises RewardError, with `zero`
    they score 0 and are counted in `errors` or `timeouts`. An answer against the protocol is such an error without
    another attempt; a refused key and a wrong path raise RewardError in any case, at the start too.
    """

    feedback_kind = "binary"

    def __init__(self, endpoint: Endpoint, *, on_error: str = "stop") -> None:
        self.endpoint, self.on_error = endpoint, on_error
        self.counters = new_counters()
        self._key = "" if endpoint.key_file is None else read_key(Path(endpoint.key_file))
        try:
            asyncio.run(self._probe())
        except _Failed as error:
            raise RewardError(
                f"the reward server {endpoint.url} does not score an empty list of responses: {error}. Start it first,"
                " or correct reward.http.url"
            ) from error

    def score(self, responses: Sequence[Response]) -> list[float]:
        responses = [Response(*response) for response in responses]
        size = self.endpoint.batch
        batches = [responses[i : i + size] for i in range(0, len(responses), size)]
        return [reward for rewards in asyncio.run(self._score(batches)) for reward in rewards]

    async def _probe(self) -> None:
        async with self._session() as session:
            await self._with_retries(session, [])

    def _session(self) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(limit=self.endpoint.concurrency)
        return aiohttp.ClientSession(connector=connector, trust_env=self.endpoint.environment_proxy)

    async def _score(self, batches: Sequence[Sequence[Response]]) -> list[list[float]]:
        """The rewards of each batch."""
        places = asyncio.Semaphore(self.endpoint.concurrency)

        async def one(session: aiohttp.ClientSession, batch: Sequence[Response]) -> list[float]:
            async with places:
                try:
                    found = await self._with_retries(session, batch)
                except _Failed as error:
                    return [self._missing(response, str(error), error.counter) for response in batch]
            null = "its answer has null for it"
            return [self._missing(r, null, "errors") if x is None else x for r, x in zip(batch, found, strict=True)]

        async with self._session() as session:
            marks = asyncio.create_task(_mark_activity())
            running = [asyncio.create_task(one(session, batch)) for batch in batches]
            try:
                return list(await asyncio.gather(*running))
            finally:
                for task in (marks, *running):
                    task.cancel()
                await asyncio.gather(marks, *running, return_exceptions=True)

    async def _with_retries(self, session: aiohttp.ClientSession, batch: Sequence[Response]) -> list[float | None]:
        pause, attempt = FIRST_PAUSE, 0
        while True:
            try:
                return await self._ask(session, batch)
            except _Failed as error:
                attempt += 1
                if not error.again or attempt > self.endpoint.retries:
                    raise
                await asyncio.sleep(min(pause if error.pause is None else error.pause, LONGEST_PAUSE))
                pause *= 2

    async def _ask(self, session: aiohttp.ClientSession, batch: Sequence[Response]) -> list[float | None]:
        body = json.dumps({"responses": [as_json(response) for response in batch]}, default=dict).encode()
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        limit = aiohttp.ClientTimeout(total=self.endpoint.timeout_seconds, sock_connect=CONNECT_SECONDS)
        try:
            request = session.post(self.endpoint.url, data=body, headers=headers, timeout=limit, allow_redirects=False)
            async with request as answer:
                raw = await _read(answer)
        except TimeoutError as error:
            seconds = self.endpoint.timeout_seconds
            raise _Failed(
                f"no answer within {seconds:g} s (reward.http.timeout_seconds)", again=True, counter="timeouts"
            ) from error
        except (aiohttp.ClientError, OSError) as error:
            raise _Failed(f"no connection: {str(error) or type(error).__name__}", again=True) from error
        if answer.status != 200:
            self._refused(answer.status, answer.headers, raw)
        return read_rewards(raw, len(batch))

    def _refused(self, status: int, headers: Mapping[str, str], raw: bytes) -> None:
        said = f"status {status}: {' '.join(raw[:500].decode(errors='replace').split()) or 'no reason given'}"
        if status in SETTINGS:
            key = "key_file" if status in (401, 403) else "url"
            raise RewardError(f"the reward server {self.endpoint.url} answered {said}. Correct reward.http.{key}")
        again = status in (408, 429) or status >= 500
        raise _Failed(said, again=again, pause=retry_after(headers.get("Retry-After", "")))

    def _missing(self, response: Response, reason: str, counter: str) -> float:
        """The reward of a response that got none; counts it in `counter`. Raises RewardError with `on_error` stop."""
        case = f"(problem {response.problem.prompt_id})"
        message = f"the reward server {self.endpoint.url} does not score a response: {reason} {case}"
        if self.on_error == "stop":
            raise RewardError(f"{message}. See its log, or set reward.on_error to zero to count such responses as 0")
        self.counters[counter] += 1
        log.warning("%s: counted as 0 (%s so far: %d)", message, counter, self.counters[counter])
        return 0.0

    def close(self) -> None:
        pass


async def _read(answer: aiohttp.ClientResponse) -> bytes:
    raw = bytearray()
    async for chunk in answer.content.iter_any():
        raw += chunk
        if len(raw) > MAX_ANSWER_BYTES:
            raise _Failed(f"its answer has more than {MAX_ANSWER_BYTES >> 20} MiB", again=False)
    return bytes(raw)


async def _mark_activity() -> None:
    """Show progress to the ranks' watch: time limits bound every request."""
    while True:
        activity.mark()
        await asyncio.sleep(MARK_SECONDS)


def read_key(path: Path) -> str:
    """The key in a file of one line. Raises UserError if others may read the file or it holds something else."""
    key = read_private(path, "the key of the reward server", "name the file in reward.http.key_file").strip()
    if not KEY.fullmatch(key):
        raise RewardError(f"reward.http.key_file {path} holds no key: one line of printable characters without spaces")
    return key


def as_json(response: Response) -> dict[str, Any]:
    """A response as the server gets it."""
    problem: Problem = response.problem
    return {
        "problem": {
            "id": problem.prompt_id,
            "question": problem.question,
            "messages": None if problem.messages is None else [dict(turn) for turn in problem.messages],
            "answer": problem.answer,
            "solution": problem.solution,
            "extra": problem.extra,
        },
        "response": response.text,
        "truncated": response.truncated,
    }


def read_rewards(raw: bytes, count: int) -> list[float | None]:
    """The rewards of an answer, None where it has null. Raises _Failed for an answer against the protocol."""
    try:
        rewards = json.loads(raw)["rewards"]
    except (ValueError, RecursionError, TypeError, KeyError) as error:
        raise _Failed('its answer is no JSON object with the list "rewards"', again=False) from error
    if not isinstance(rewards, list) or len(rewards) != count:
        found = len(rewards) if isinstance(rewards, list) else type(rewards).__name__
        raise _Failed(f"its answer has {found} rewards for {count} responses", again=False)
    for reward in rewards:
        if not (reward is None or isinstance(reward, int | float) and abs(reward) < 1e300 and math.isfinite(reward)):
            raise _Failed(f"its answer has the reward {str(reward)[:40]!r}, which is no finite number", again=False)
    return [None if reward is None else float(reward) for reward in rewards]


def retry_after(text: str) -> float | None:
    """The seconds of a header Retry-After (a number or a date); None if it says nothing usable."""
    with suppress(ValueError, TypeError, OverflowError):
        seconds = float(text) if text.strip().isdigit() else parsedate_to_datetime(text).timestamp() - time.time()
        return max(seconds, 0.0)
    return None

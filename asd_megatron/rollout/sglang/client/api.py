"""One SGLang server over HTTP: its native `/generate` with token ids in and out, its health, its administration.

SGLang offers two keys. The generation key opens `/generate` and the information pages, the administration key (once a
server has one) everything that changes the server; neither is accepted in place of the other.

Requests never go through a proxy of the environment (`http_proxy`, `https_proxy`, `all_proxy`), whatever the server's
address: a cluster's proxy does not reach its compute nodes, nor anybody's loopback, and would see the keys.
"""

from __future__ import annotations

import json
import math
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import aiohttp
import numpy as np

from asd_megatron.errors import UserError
from asd_megatron.records import equal_fields
from asd_megatron.rollout.sglang.client.routing import Routing

if TYPE_CHECKING:
    from asd_megatron.records import TokenIds

API_KEY_VARIABLE = "ASD_MEGATRON_API_KEY"
ADMIN_KEY_VARIABLE = "ASD_MEGATRON_ADMIN_KEY"
INCOMPLETE = "-incomplete"  # ends the label of weights that are being replaced

FINISH_REASONS = ("stop", "length", "abort")
CONNECT_SECONDS = 10.0  # for a TCP connection (with TLS)
KEEP_ALIVE_SECONDS = 2.0  # less than a server's five: a connection is never used while the server closes it


class ServerError(Exception):
    """A server did not do what it was asked. The text names the server and what it said."""

    def __init__(self, url: str, what: str) -> None:
        super().__init__(f"{url} {what}")
        self.url = url
        self.what = what


class ServerDown(ServerError):
    """No connection, a connection that broke, no answer in time, or an answer 5xx other than 503."""


class ServerLate(ServerDown):
    """No answer in time: the server hangs or is overloaded."""


class ServerBusy(ServerError):
    """A 503 or 429 answer: the server works and cannot take this request now. Retry later."""


class ServerRefused(ServerError, UserError):
    """A 4xx answer: the same request will be refused again. `status` is the HTTP status."""

    def __init__(self, url: str, what: str, status: int) -> None:
        super().__init__(url, what)
        self.status = status


class InvalidAnswer(ServerError):
    """The answer does not follow the interface: ids, log-probs and labels that do not match."""


@dataclass(frozen=True, eq=False)
class Generation:
    """One answer of `/generate`.

    `output_ids`: int32; `logprobs[t]` (float32) is the log-probability of `output_ids[t]` at the request's temperature,
    before top-p and top-k (SGLang takes them at temperature 1 for a greedy request). `spans`: (start, label),
    ascending: from output position `start` on the weights were `label`; the last label is `label`. Empty if the server
    does not say, and for an abort that came before the first token. `routed_experts`: int16 [input and output tokens -
    1, layers, experts of a token], or None with the reason in `unrouted` if they were asked for and cannot be used.
    """

    output_ids: TokenIds
    logprobs: np.ndarray[Any, np.dtype[np.float32]]
    finish_reason: str
    label: str
    spans: tuple[tuple[int, str], ...]
    routed_experts: np.ndarray[Any, Any] | None = field(default=None, compare=False, repr=False)
    unrouted: str = ""

    __eq__ = equal_fields


def new_session() -> aiohttp.ClientSession:
    """A session for any number of servers and connections. Made inside the event loop that uses it; close it there."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_SECONDS)
    return aiohttp.ClientSession(connector=connector, trust_env=False)


class SGLangServer:
    """The server at `url` (http or https). Methods raise a ServerError and nothing else.

    `ca_file`: certificates in PEM that an https server is checked against, instead of the system's. Every method but
    `generate`, whose caller has a deadline of its own, is bounded by `timeout` seconds.
    """

    def __init__(
        self,
        url: str,
        session: aiohttp.ClientSession,
        api_key: str = "",
        admin_key: str = "",
        ca_file: str | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self._session = session
        self._api_key = api_key.strip()
        self._admin_key = admin_key.strip()
        self._ssl = _trusted(ca_file) if self.url.startswith("https:") else True

    async def generate(
        self, input_ids: Sequence[int], sampling: Mapping[str, Any], routing: Routing | None = None
    ) -> Generation:
        """One sample of one prompt; `sampling` is SGLang's `sampling_params`. With `routing`, the model's, the routed
        experts are asked for too. Cancelling the task gives it up."""
        body = {"input_ids": list(input_ids), "sampling_params": dict(sampling), "return_logprob": True}
        if routing is not None:
            body["return_routed_experts"] = True
        answer = await self._ask("POST", "/generate", body, None)
        try:
            generation = read_generation(answer)
            return generation if routing is None else _routed(generation, answer, routing, len(input_ids))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise InvalidAnswer(self.url, f"gave an answer that cannot be used: {error!r}") from error

    async def healthy(self, timeout: float) -> None:
        """Return if the server generates tokens: one for this call if it has nothing else to do. A hung server raises.

        Takes a second or more, and fails while generation is paused.
        """
        await self._ask("GET", "/health", None, timeout)

    async def routing(self, timeout: float) -> None:
        """Return if this is an sglang-router with a server behind it that works."""
        await self._ask("GET", "/readiness", None, timeout)

    async def model_info(self, timeout: float) -> dict[str, Any]:
        """`/model_info`: `weight_version`, `model_path`, `architectures` and more."""
        return await self._ask("GET", "/model_info", None, timeout)

    async def server_info(self, timeout: float) -> dict[str, Any]:
        """`/server_info`: `version`, `tp_size` and its other arguments. Paused or not, its scheduler takes part."""
        return await self._ask("GET", "/server_info", None, timeout)

    async def post(self, path: str, body: Mapping[str, Any] | None, timeout: float) -> dict[str, Any]:
        """A request with the administration key (`/generate`: the generation key). Returns its JSON object; another
        answer comes as {"text": ...} or {"value": ...}.

        SGLang answers 400 to one that it could not carry out: ServerRefused, with its reason.
        """
        return await self._ask("POST", path, dict(body or {}), timeout, admin=path != "/generate")

    async def _ask(
        self, method: str, path: str, body: Mapping[str, Any] | None, timeout: float | None, admin: bool = False
    ) -> dict[str, Any]:
        key = self._admin_key or self._api_key if admin else self._api_key
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limit = aiohttp.ClientTimeout(total=timeout, sock_connect=CONNECT_SECONDS)
        try:
            request = self._session.request(
                method, self.url + path, json=body, headers=headers, timeout=limit, ssl=self._ssl, allow_redirects=False
            )
            async with request as response:
                status, raw = response.status, await response.read()
        except TimeoutError as error:
            raise ServerLate(self.url, f"did not answer {path} in time") from error
        except (aiohttp.ClientError, OSError) as error:
            raise ServerDown(self.url, f"cannot be reached: {str(error) or type(error).__name__}") from error
        if status != 200:
            raise self._refusal(status, path, raw.decode(errors="replace"), admin)
        return _object(raw.decode(errors="replace"))

    def _refusal(self, status: int, path: str, text: str, admin: bool) -> ServerError:
        reason = f"answered {status} to {path}: {_reason(text)}"
        if status in (401, 403):
            variable = ADMIN_KEY_VARIABLE if admin else API_KEY_VARIABLE
            kind = "administration" if admin else "generation"
            return ServerRefused(
                self.url,
                f"refused the {kind} key ({status} to {path}): give the key that the server was started with in the"
                f" environment variable {variable}",
                status,
            )
        if status in (429, 503):
            return ServerBusy(self.url, reason)
        return ServerDown(self.url, reason) if status >= 500 else ServerRefused(self.url, reason, status)


def _trusted(ca_file: str | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_file)
    except (OSError, ssl.SSLError) as error:
        raise UserError(f"the certificate file {ca_file} cannot be used ({error}): give one in PEM format") from error


def _object(text: str) -> dict[str, Any]:
    """The JSON object of an answer. Plain text and other JSON, with which SGLang answers some requests, are wrapped."""
    try:
        value = json.loads(text)
    except ValueError:
        return {"text": text}
    return value if isinstance(value, dict) else {"value": value}


def _reason(text: str) -> str:
    """What an error answer says, from whichever of its fields says it."""
    try:
        value = json.loads(text)
        while isinstance(value, dict):
            value = next((value[name] for name in ("error", "message", "detail") if name in value), str(value))
    except ValueError:
        value = text
    return " ".join(str(value).split())[:500] or "no reason given"


def read_generation(answer: Mapping[str, Any]) -> Generation:
    """Raises ValueError or one of its kind if the parts do not fit together."""
    meta = answer["meta_info"]
    ids = answer["output_ids"]
    triples = meta.get("output_token_logprobs") or []
    reason = meta["finish_reason"]["type"]
    label = meta["weight_version"]
    if reason not in FINISH_REASONS:
        raise ValueError(f"finish reason {reason!r}")
    if not set(map(type, ids)) <= {int} or ids and not 0 <= min(ids) <= max(ids) < 1 << 31:
        raise ValueError("output ids are not all token ids")
    if [triple[1] for triple in triples] != ids:
        raise ValueError(f"{len(triples)} log-probs do not belong to the {len(ids)} output ids")
    values = [triple[0] for triple in triples]
    logprobs = np.array(values if set(map(type, values)) <= {int, float} else [math.nan], dtype=np.float32)
    if not np.isfinite(logprobs).all():
        raise ValueError("a log-prob is not finite")
    if not isinstance(label, str):
        raise ValueError(f"weight version {label!r}")
    spans = _spans(meta.get("weight_versions") or [], len(ids), label)
    return Generation(np.array(ids, dtype=np.int32), logprobs, reason, label, spans)


def _routed(generation: Generation, answer: Mapping[str, Any], routing: Routing, inputs: int) -> Generation:
    """With its routed experts. An answer without usable ones is as good as any other: the trainer routes by itself."""
    try:
        found = routing.read(answer["meta_info"].get("routed_experts"), inputs + len(generation.output_ids))
    except ValueError as error:
        return replace(generation, unrouted=str(error))
    return replace(generation, routed_experts=found)


def _spans(said: Sequence[Mapping[str, Any]], tokens: int, label: str) -> tuple[tuple[int, str], ...]:
    end = 0
    for span in said:
        if span["start"] != end or span["end"] < end or not isinstance(span["version"], str):
            raise ValueError(f"weight versions {said!r} do not follow one another")
        end = span["end"]
    if said and (end != tokens or said[-1]["version"] != label):
        raise ValueError(f"weight versions {said!r} do not cover {tokens} tokens up to {label!r}")
    return tuple((span["start"], span["version"]) for span in said)

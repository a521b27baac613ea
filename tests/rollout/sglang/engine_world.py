"""A rollout engine over fake servers: its parts, and what its tests ask again and again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from asd_megatron.records import Group, SamplingParams
from asd_megatron.rollout.sglang.client.api import ServerError
from asd_megatron.rollout.sglang.client.fleet import Fleet
from asd_megatron.rollout.sglang.controller import Controller, ServedModel
from asd_megatron.rollout.sglang.engine import SGLangEngine
from asd_megatron.rollout.sglang.grouping import Assembler, Labels
from asd_megatron.rollout.sglang.weight_sync.delta import Deltas, DeltaTransport
from asd_megatron.rollout.sglang.weight_sync.protocol import Receiver
from tests.rollout.sglang.fake_sglang import ADMIN_KEY, API_KEY, FakeSGLang
from tests.rollout.toy import ToyTokenizer

PARAMS = SamplingParams(n=2, max_new_tokens=6)
TENSORS = 3


class Source:
    """Weights whose reader says how often they were read, as a rank of the trainer yields them."""

    def __init__(self, version: int = 0, root: bool = True) -> None:
        self.version = version
        self.root = root
        self.readings = 0

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for i in range(TENSORS):
            if self.root:
                yield f"t{i}", torch.full((2,), float(self.version))
        self.readings += 1


class Transport:
    """Delivers at once. `failing`: URLs that do not get the next transmissions, one list each."""

    needs_session = True

    def __init__(self) -> None:
        self.failing: list[list[str]] = []
        self.sent: list[tuple[int, str, int]] = []
        self.kinds: dict[str, torch.dtype] = {}  # of the last transmission, by name

    def send(self, receivers: Sequence[Receiver], tensors: Any, label: str) -> dict[str, str]:
        self.kinds = {name: tensor.dtype for name, tensor in tensors}
        self.sent.append((len(receivers), label.rpartition("-")[2], len(self.kinds)))
        bad = self.failing.pop(0) if self.failing else []
        failures = {r.url: "broken on purpose" for r in receivers if r.url in bad}
        for receiver in receivers:
            if receiver.url not in failures:
                try:
                    receiver.call("/load_weights", {}, 5.0)
                except ServerError as error:
                    failures[receiver.url] = error.what
        return failures

    def close(self) -> None: ...


class Pool:
    """Restarts fake servers that have died, at once unless starts are deferred. `log`: what
    it was told and did."""

    def __init__(self, servers: Sequence[FakeSGLang]) -> None:
        self.servers = {server.url: server for server in servers}
        self.counters = {"restarts": 0}
        self.deferred = False
        self.killed: list[str] = []
        self.log: list[str] = []

    def start(self) -> None: ...

    @property
    def restarting(self) -> list[str]:
        dead = [server for server in self.servers.values() if server.dead]
        for server in dead:
            if not self.deferred:
                server.restart()
                self.counters["restarts"] += 1
                self.log.append("restart")
        return [server.url for server in dead]

    def defer_starts(self) -> None:
        self.deferred = True
        self.log.append("defer")

    def allow_starts(self) -> None:
        self.deferred = False
        self.log.append("allow")

    def kill(self, url: str) -> None:
        self.killed.append(url)
        self.servers[url].die()


class World:
    """An engine of one rank, or rank 0's, over fake servers."""

    def __init__(self, process_groups: Any, servers: Sequence[FakeSGLang], closing: ExitStack, **over: Any) -> None:
        self.servers, self.transport, self.labels = list(servers), Transport(), Labels("cafe")
        self.pool: Any = Pool(servers)
        self.fleet = Fleet(
            [s.url for s in servers],
            api_key=API_KEY,
            admin_key=ADMIN_KEY,
            probe_every=0.1,
            probe_timeout=0.5,
            request_timeout=over.pop("request_timeout", 20.0),
            retries=over.pop("retries", 3),
        )
        closing.callback(self.fleet.close)
        settings: dict[str, Any] = {
            "model": ServedModel(("Fake",), 1000),
            "pool": self.pool if over.get("colocated") else None,
            "verifier": None,
            "tolerance": 0.1,
            "probe_ids": (1, 2),
            "quantize": False,
            "start_timeout": 10.0,
            "wait_timeout": 1.0,
            "colocated": False,
        }
        assembler = Assembler(ToyTokenizer(), 5, self.labels, bank=over.pop("bank", None))
        full_every = over.pop("full_every", 1)
        self.deltas = Deltas(full_every)
        transport = DeltaTransport(self.transport, self.deltas) if full_every > 1 else self.transport
        self.controller = Controller(
            self.fleet, transport, assembler, self.labels, closing=ExitStack(), **{**settings, **over}
        )
        self.engine = engine_of(process_groups, self.controller)
        self.fleet.connect(10.0)


def engine_of(process_groups: Any, controller: Controller | None) -> SGLangEngine:
    return SGLangEngine(process_groups, controller, probe=None, max_positions=64, end_ids=(0,))


@contextmanager
def servers(number: int, **settings: Any) -> Iterator[list[FakeSGLang]]:
    with ExitStack() as closing:
        made = [FakeSGLang(**settings) for _ in range(number)]
        for server in made:
            closing.callback(server.close)
        yield made


def finish(engine: SGLangEngine, timeout: float = 20.0) -> list[Group]:
    found: list[Group] = []
    while engine.pending:
        found += engine.collect(timeout)
    return found


@pytest.fixture
def closing() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def pair(closing: ExitStack) -> list[FakeSGLang]:
    return closing.enter_context(servers(2))

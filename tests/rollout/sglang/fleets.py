"""Fleets on fake servers: fixtures and what their tests ask again and again."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from asd_megatron.rollout.sglang.client.fleet import Fleet
from asd_megatron.rollout.sglang.client.scheduling import SampleRequest, SampleResult
from tests.rollout.sglang.fake_sglang import ADMIN_KEY, API_KEY, FakeSGLang, made_from

LABEL = "tag-1"
Make = Callable[..., Fleet]


@pytest.fixture
def fake_pair() -> Iterator[tuple[FakeSGLang, FakeSGLang]]:
    servers = FakeSGLang(label=LABEL), FakeSGLang(label=LABEL)
    yield servers
    for server in servers:
        server.close()


@pytest.fixture
def make_fleet() -> Iterator[Make]:
    """Fleets that are closed afterwards; with admitted servers unless told otherwise."""
    fleets = []

    def build(*servers: FakeSGLang, admit: bool = True, **options: Any) -> Fleet:
        defaults: dict[str, Any] = {
            "max_concurrent": 4,
            "request_timeout": 5.0,
            "probe_every": 0.1,
            "probe_timeout": 5.0,
        }
        fleet = Fleet([s.url for s in servers], api_key=API_KEY, admin_key=ADMIN_KEY, **{**defaults, **options})
        fleets.append(fleet)
        if admit:
            fleet.connect(5.0)
            for server in servers:
                fleet.admit(server.url, server.label)
        return fleet

    yield build
    for fleet in fleets:
        fleet.close()


def requests(groups: int, samples: int, tokens: int = 4) -> list[SampleRequest]:
    return [
        SampleRequest((g, s), g, (g + 1, s + 1), {"max_new_tokens": tokens})
        for g in range(groups)
        for s in range(samples)
    ]


def gather(fleet: Fleet, seconds: float = 10.0) -> list[SampleResult]:
    """Everything pending, or a failure."""
    results, deadline = [], time.monotonic() + seconds
    while fleet.pending:
        assert time.monotonic() < deadline, f"{fleet.pending} samples missing, {fleet.servers()}"
        results += fleet.wait(0.5)
    assert fleet.wait(0.0) == []
    return results


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not come true"
        time.sleep(0.01)


def once_each(results: list[SampleResult], asked: list[SampleRequest]) -> None:
    assert Counter(r.key for r in results) == Counter(r.key for r in asked)


def check_complete(results: list[SampleResult], asked: list[SampleRequest]) -> None:
    """Each sample once, with its own answer."""
    once_each(results, asked)
    inputs = {r.key: r for r in asked}
    for result in results:
        request = inputs[result.key]
        assert result.finish_reason == "length"
        assert list(result.output_ids) == made_from(list(request.input_ids), request.sampling["max_new_tokens"])
        assert len(result.logprobs) == len(result.output_ids)

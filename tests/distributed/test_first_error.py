"""One of several failing ranks reports: ranks as threads that meet at a store."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest
import torch.distributed as dist

from asd_megatron.distributed import first_error
from asd_megatron.distributed.first_error import report_once

SECONDS = 30


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    """What torchrun's agent tells its ranks."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield {
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
    }


def test_rank_0_reports_what_all_ranks_refuse(environment: dict[str, str]) -> None:
    said: list[str] = []

    def rank(number: str) -> str | None:
        return report_once("no corpus", lambda: said.append(number), environment | {"RANK": number})

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(rank, "210"))
    assert said == ["0"] and found == ["no corpus", "no corpus", None]
    assert report_once("again", lambda: None, environment | {"RANK": "1", "TORCHELASTIC_RESTART_COUNT": "1"}) is None


def test_others_return_after_the_report(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 alone has the cause; rank 0, whose collective broke, ends only when rank 1 has reported."""
    monkeypatch.setattr(first_error, "HEAD_START", 0.0)
    monkeypatch.setattr(first_error, "REPORT_SECONDS", float(SECONDS))
    claimed, may_report, order = Event(), Event(), list[str]()

    def report() -> None:
        claimed.set()
        assert may_report.wait(SECONDS)
        order.append("reported")

    def late() -> str | None:
        found = report_once("connection closed", lambda: order.append("wrong"), environment | {"RANK": "0"})
        order.append("returned")
        return found

    with ThreadPoolExecutor(2) as pool:
        cause = pool.submit(report_once, "boom", report, environment | {"RANK": "1"})
        assert claimed.wait(SECONDS)
        consequence = pool.submit(late)
        may_report.set()
        assert cause.result(SECONDS) is None and consequence.result(SECONDS) == "boom"
    assert order == ["reported", "returned"]


@pytest.mark.parametrize("reachable", [True, False])
def test_a_rank_that_can_ask_nobody_reports(monkeypatch: pytest.MonkeyPatch, reachable: bool) -> None:
    monkeypatch.setattr(first_error, "HEAD_START", 0.0)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = store.port
    del store  # nobody listens there any more
    environment = {"RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    monkeypatch.setattr(first_error, "CONNECT", first_error.timedelta(seconds=1))
    if reachable:
        environment["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    said: list[str] = []
    assert report_once("no corpus", lambda: said.append("reported"), environment) is None
    assert said == ["reported"]

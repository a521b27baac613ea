"""The update group: the requests to join it, and that no wait for a server is unbounded."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch

from asd_megatron.errors import UserError
from asd_megatron.rollout.sglang.weight_sync import update_group
from asd_megatron.rollout.sglang.weight_sync.distributed import DistributedTransport
from asd_megatron.rollout.sglang.weight_sync.update_group import address_towards
from tests.rollout.sglang.weight_sync.world import FakeReceiver

CPU = torch.device("cpu")
MODEL = [(f"t{i}", torch.randn(10)) for i in range(5)]


def test_servers_here_are_met_on_the_loopback_interface() -> None:
    assert address_towards(["http://127.0.0.1:30000", "http://localhost:30001"]) == "127.0.0.1"


def test_a_server_that_cannot_be_found_is_named() -> None:
    with pytest.raises(UserError, match=r"http://nowhere\.invalid:3 cannot be resolved"):
        address_towards(["http://nowhere.invalid:3"])


def test_an_address_of_another_machine_is_refused() -> None:
    transport = DistributedTransport(CPU, address="192.0.2.1", timeout=5)
    with pytest.raises(UserError, match=r"192\.0\.2\.1 is no address of this machine"):
        transport.send([FakeReceiver()], iter(MODEL), "aa-1")


def test_a_server_that_refuses_to_join_ends_the_wait_of_everybody_at_once() -> None:
    waiting = threading.Event()

    def never(path: str, body: dict[str, Any]) -> dict[str, Any]:
        if path == "/init_weights_update_group":
            waiting.wait(2)  # as one that waits for the other
        return {"success": True}

    refusing = FakeReceiver("http://127.0.0.1:1", lambda path, body: {"success": False, "message": "not now"})
    patient = FakeReceiver("http://127.0.0.1:2", never)
    patient.tensor_parallel = 2
    start, stream = time.monotonic(), iter(MODEL)
    failures = DistributedTransport(CPU, timeout=60).send([patient, refusing], stream, "aa-1")
    assert time.monotonic() - start < 20
    assert failures[refusing.url] == "/init_weights_update_group: not now"
    assert failures[patient.url].startswith("the update group was not created")
    assert list(stream) == []
    invitations = [dict(receiver.calls[0][1]) for receiver in (patient, refusing)]
    assert [(i["rank_offset"], i["world_size"], i["backend"]) for i in invitations] == [(1, 4, "gloo"), (3, 4, "gloo")]
    assert invitations[0]["group_name"] == invitations[1]["group_name"]
    assert invitations[0]["master_address"] == "127.0.0.1"


def test_a_server_that_says_yes_and_does_not_come_is_waited_for_no_longer_than_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(update_group, "JOIN_SECONDS", 1.0)
    start, stream = time.monotonic(), iter(MODEL)
    failures = DistributedTransport(CPU).send([FakeReceiver("http://127.0.0.1:1")], stream, "aa-1")
    assert time.monotonic() - start < 20
    assert failures["http://127.0.0.1:1"].startswith("the update group was not created")
    assert list(stream) == []


def test_without_servers_there_is_no_group() -> None:
    stream = iter(MODEL)
    transport = DistributedTransport(CPU)
    assert transport.send([], stream, "aa-1") == {}
    assert list(stream) == []
    transport.close()
    transport.close()


def test_what_reading_the_tensors_raises_passes_through() -> None:
    def broken() -> Any:
        yield MODEL[0]
        raise RuntimeError("another rank died")

    with pytest.raises(RuntimeError, match="another rank died"):
        DistributedTransport(CPU).send([], broken(), "aa-1")

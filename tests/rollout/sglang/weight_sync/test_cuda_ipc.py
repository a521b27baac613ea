"""Weights by CUDA IPC handle: which servers can take them, and what the payload holds."""

from __future__ import annotations

import base64
import pickle
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch

from asd_megatron.errors import UserError
from asd_megatron.rollout.sglang.weight_sync.buckets import pack
from asd_megatron.rollout.sglang.weight_sync.cuda_ipc import (
    DEVICE_ARGUMENT,
    REBUILD_ARGUMENTS,
    CudaIpcTransport,
    payloads,
)
from tests.rollout.sglang.weight_sync.world import FakeReceiver

CPU = torch.device("cpu")
MODEL = [("a", torch.randn(4, 3)), ("b", torch.randn(7).bfloat16()), ("c", torch.randn(2, 2))]


def _read(payload: str) -> list[tuple[str, torch.Tensor]]:
    """As a server does, which has its own list of what a pickle may name."""
    content = pickle.loads(base64.b64decode(payload))
    flat = content["flattened_tensor"]
    return [(m.name, flat[m.start_idx : m.end_idx].view(m.dtype).reshape(m.shape).clone()) for m in content["metadata"]]


def test_what_counts_is_the_form_of_a_handle_and_not_the_version_of_torch() -> None:
    """NVIDIA's containers have a torch of their own: `2.9.0a0+hash.nv25.11`."""
    CudaIpcTransport(list(REBUILD_ARGUMENTS), device=CPU)
    other = [*REBUILD_ARGUMENTS[:7], "more", *REBUILD_ARGUMENTS[7:]]
    for arguments, number in ((other, 8), (REBUILD_ARGUMENTS[:-1], len(REBUILD_ARGUMENTS)), ((), 1)):
        with pytest.raises(UserError, match=rf"argument {number} of rebuild_cuda_tensor.*rollout\.weight_sync disk"):
            CudaIpcTransport(arguments, device=CPU)


def test_sglangs_place_of_the_device_is_torchs() -> None:
    assert REBUILD_ARGUMENTS[DEVICE_ARGUMENT] == "storage_device"


def test_servers_elsewhere_are_refused_and_the_tensors_are_read() -> None:
    transport, stream = CudaIpcTransport(REBUILD_ARGUMENTS, device=CPU), iter(MODEL)
    with pytest.raises(UserError, match="not on this machine's loopback interface"):
        transport.send([FakeReceiver("http://10.0.0.5:30000")], stream, "aa-1")
    assert list(stream) == []


def test_every_rank_gets_a_handle_of_its_own_to_the_same_bytes() -> None:
    (bucket,) = pack(MODEL[:1] + MODEL[2:], 1000)
    first, second = payloads(bucket, 2)
    for payload in (first, second):
        assert [name for name, _ in _read(payload)] == ["a", "c"]
        assert torch.equal(_read(payload)[0][1], MODEL[0][1])


def test_a_server_that_refuses_is_named_and_sent_nothing_more() -> None:
    received: list[str] = []

    def take(path: str, body: dict[str, Any]) -> dict[str, Any]:
        received.extend(name for name, _ in _read(body["serialized_named_tensors"][0]))
        return {"success": True}

    refusing = FakeReceiver("http://localhost:1", lambda path, body: {"success": False, "message": "no session"})
    taking = FakeReceiver("http://127.0.0.1:2", take)
    failures = CudaIpcTransport(REBUILD_ARGUMENTS, device=CPU, bucket_bytes=50).send(
        [refusing, taking], iter(MODEL), "aa-1"
    )
    assert failures == {"http://localhost:1": "/update_weights_from_tensor: no session"}
    assert len(refusing.calls) == 1
    assert sorted(received) == ["a", "b", "c"]


def test_a_server_that_hangs_is_named_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asd_megatron.rollout.sglang.weight_sync.cuda_ipc.SLACK_SECONDS", 0.1)
    released = threading.Event()

    def hang(path: str, body: dict[str, Any]) -> dict[str, Any]:
        released.wait(60)
        return {}

    hanging, taking = FakeReceiver("http://127.0.0.1:1", hang), FakeReceiver("http://127.0.0.1:2")
    transport = CudaIpcTransport(REBUILD_ARGUMENTS, device=CPU, bucket_bytes=50, timeout=1.0)
    try:
        failures = transport.send([hanging, taking], iter(MODEL), "aa-1")
    finally:
        released.set()
    assert list(failures) == [hanging.url] and "rollout.weight_sync_timeout" in failures[hanging.url]
    assert len(hanging.calls) == 1 and len(taking.calls) > 1


_OTHER_PROCESS = """
import base64, pickle, sys, torch
from torch.multiprocessing import reductions
rebuild = reductions.rebuild_cuda_tensor
def by_uuid(*arguments):  # as SGLang's patch
    uuids = [str(torch.cuda.get_device_properties(d).uuid) for d in range(torch.cuda.device_count())]
    return rebuild(*arguments[:6], uuids.index(arguments[6]), *arguments[7:])
reductions.rebuild_cuda_tensor = by_uuid
content = pickle.loads(base64.b64decode(sys.stdin.read()))
print(content["flattened_tensor"].view(torch.float32).sum().item())
"""


@pytest.mark.gpu
def test_another_process_maps_the_memory_by_the_devices_uuid() -> None:
    (bucket,) = pack([("a", torch.full((1000,), 0.5, device="cuda"))], 4000)
    (payload,) = payloads(bucket, 1)
    command = [sys.executable, "-c", _OTHER_PROCESS]
    done = subprocess.run(command, input=payload, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == 500.0

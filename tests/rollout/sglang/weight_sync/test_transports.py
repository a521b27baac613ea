"""Two real servers take weights by every transport that a CPU can run, and survive what goes wrong on the way."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from asd_megatron.distributed.layout import Layout
from asd_megatron.rollout.sglang.weight_sync import distributed, update_group
from asd_megatron.rollout.sglang.weight_sync.cuda_ipc import REBUILD_ARGUMENTS, CudaIpcTransport
from asd_megatron.rollout.sglang.weight_sync.delta import Deltas
from asd_megatron.rollout.sglang.weight_sync.disk import DiskTransport
from asd_megatron.rollout.sglang.weight_sync.distributed import DistributedTransport
from asd_megatron.rollout.sglang.weight_sync.protocol import NamedTensors, Receiver, Transport, VerificationError
from asd_megatron.rollout.sglang.weight_sync.synchronise import synchronise
from asd_megatron.rollout.sglang.weight_sync.verification import Probe, WeightVerifier, server_logprobs
from tests.distributed.harness import run_ranks
from tests.rollout.sglang.sglang_world import API_KEY, SGLangWorld
from tests.rollout.sglang.weight_sync.layouts import Trainer
from tests.rollout.sglang.weight_sync.world import PROBE_IDS, HttpReceiver, logprobs, partly_changed, tensors, watched

pytestmark = pytest.mark.sglang
CPU = torch.device("cpu")
SMALL = 16_384  # bytes: a bucket holds a tenth of the model
TOLERANCE = 1e-4


@pytest.fixture
def servers(sglang_pair: SGLangWorld) -> list[HttpReceiver]:
    return [HttpReceiver(url) for url in sglang_pair.urls]


@pytest.fixture
def transport() -> Iterator[DistributedTransport]:
    made = DistributedTransport(CPU, bucket_bytes=SMALL, timeout=20)
    yield made
    made.close()


def _verifier(folder: Path, seed: int | None = None) -> WeightVerifier:
    config = json.loads((folder / "config.json").read_text())
    asked = None if seed is None else Probe(PROBE_IDS, logprobs(folder, seed), TOLERANCE)
    return WeightVerifier(config, dtype=torch.float32, device="cpu", probe=asked)


def _assert_serves(receiver: HttpReceiver, folder: Path, seed: int, label: str) -> None:
    assert receiver.label() == label
    assert server_logprobs(receiver, PROBE_IDS, 30) == pytest.approx(logprobs(folder, seed), abs=TOLERANCE)


def _distributed(folder: Path, tmp_path: Path) -> Transport:
    return DistributedTransport(CPU, bucket_bytes=SMALL)


def _disk(folder: Path, tmp_path: Path) -> Transport:
    return DiskTransport(tmp_path / "weights", folder, max_shard_bytes=50_000)


def _shared_memory(folder: Path, tmp_path: Path) -> Transport:
    return CudaIpcTransport(REBUILD_ARGUMENTS, device=CPU, bucket_bytes=SMALL)


@pytest.mark.parametrize("make", [_distributed, _disk, _shared_memory])
def test_every_update_is_complete_and_verified(
    make: Callable[[Path, Path], Transport], sglang_pair: SGLangWorld, servers: list[HttpReceiver], tmp_path: Path
) -> None:
    folder = sglang_pair.folder
    made = make(folder, tmp_path)
    for seed in (1, 2):
        sent = tensors(folder, seed)
        report = synchronise(made, servers, sent, f"0a0a0a0a-{seed}", verifier=_verifier(folder, seed))
        assert report.failures == {}
        assert report.tensors == len(sent)
        assert report.bytes == sum(4 * tensor.numel() for _, tensor in sent)
        assert report.checked == 2 * 35  # of one rank of each server
        assert len(report.probes) == 2 and all(probe.maximum < TOLERANCE for probe in report.probes.values())
        for server in servers:
            _assert_serves(server, folder, seed, f"0a0a0a0a-{seed}")
    made.close()


def _every_rank(rank: int, folder: str, urls: list[str]) -> int:
    """Both ways of a trainer of four ranks. Its second stage, and its second replica, have ranks of their own."""
    receivers = [HttpReceiver(url) for url in urls] if rank == 0 else []
    hosts = {urls[0]: (1,), urls[1]: (3,)}
    done, labels = 0, [f"0d0d0d0d-{n}" for n in range(8)]
    for layout in (Layout(tensor=2, pipeline=2), Layout(pipeline=2, data=2)):
        for kind in ("distributed", "cuda_ipc"):
            trainer = Trainer(Path(folder), layout, kind, hosts)
            for seed in (1, 2):
                trainer.port.load(dict(tensors(Path(folder), seed)))
                label = labels.pop(0)
                report = trainer.send(receivers, label)
                if report is not None:
                    assert report.failures == {} and report.checked == 2 * 35
                    for receiver in receivers:
                        _assert_serves(receiver, Path(folder), seed, label)
                    done += 1
                    if kind == "distributed" and seed == 1:  # as a server that was restarted since
                        assert isinstance(trainer.transport, DistributedTransport)
                        group = trainer.transport._groups[layout.stage_size]
                        receivers[1].call("/destroy_weights_update_group", {"group_name": group.name}, 20)
            trainer.transport.close()
        done += _deltas(Path(folder), layout, receivers)
    return done


def _deltas(folder: Path, layout: Layout, receivers: list[HttpReceiver]) -> int:
    """A complete update, two deltas of each stage, and a complete one again."""
    deltas = Deltas(full_every=3)
    trainer, model = Trainer(folder, layout, "distributed", deltas=deltas), tensors(folder, 3)
    for number in range(4):
        trainer.port.load(dict(model))
        report = trainer.send(receivers, f"0e0e0e0e-{layout.data}{number}")
        if report is not None:
            assert report.failures == {} and report.checked == 2 * 35, "bit for bit"
            assert deltas.full is (number in (0, 3))
            assert deltas.full or deltas.sent_bytes < 0.2 * report.bytes
        model = partly_changed(model, number)
    trainer.transport.close()
    return 4 * bool(receivers)


def test_every_stage_sends_and_every_rank_shares_its_own_memory(sglang_pair: SGLangWorld) -> None:
    assert run_ranks(_every_rank, 4, str(sglang_pair.folder), sglang_pair.urls, timeout=240)[0] == 16


def test_an_element_changed_on_the_way_is_noticed_by_its_tensors_name(
    sglang_pair: SGLangWorld, servers: list[HttpReceiver], transport: DistributedTransport
) -> None:
    class Corrupting:
        needs_session = True

        def send(self, receivers: Sequence[Receiver], stream: NamedTensors, label: str) -> dict[str, str]:
            return transport.send(receivers, self._corrupted(stream), label)

        def _corrupted(self, stream: NamedTensors) -> NamedTensors:
            for name, tensor in stream:
                if name == "model.layers.2.self_attn.k_proj.weight":
                    tensor = tensor.clone()
                    tensor[3, 5] += 1e-6
                yield name, tensor

        def close(self) -> None: ...

    folder = sglang_pair.folder
    with pytest.raises(VerificationError, match=r"rank 0, .*: model\.layers\.2\.self_attn\.qkv_proj\.weight differs"):
        synchronise(Corrupting(), servers, tensors(folder, 3), "0b0b0b0b-3", verifier=_verifier(folder))
    assert [server.label() for server in servers] == ["0b0b0b0b-3-incomplete"] * 2


def test_other_logprobs_than_the_trainers_are_noticed(
    sglang_pair: SGLangWorld, servers: list[HttpReceiver], transport: DistributedTransport
) -> None:
    verifier, sent = _verifier(sglang_pair.folder, seed=4), tensors(sglang_pair.folder, 5)
    report = synchronise(transport, servers, sent, "0c0c0c0c-5", verifier=verifier)
    assert report.failures == {} and all(probe.exceeded for probe in report.probes.values())
    with pytest.raises(VerificationError, match=r"computes other log-probs than the trainer: .* at token \d"):
        synchronise(transport, servers, sent, "0c0c0c0c-6", verifier=verifier)


def test_a_running_request_goes_on_under_the_new_weights_and_says_since_when(
    sglang_pair: SGLangWorld, servers: list[HttpReceiver], transport: DistributedTransport
) -> None:
    folder, prompt = sglang_pair.folder, [5, 9, 31]
    synchronise(transport, servers, tensors(folder, 1), "0d0d0d0d-1")
    started, answers = threading.Event(), []

    def generate() -> None:
        body = {
            "input_ids": prompt,
            "sampling_params": {"max_new_tokens": 110, "temperature": 1.0, "ignore_eos": True},
            "return_logprob": True,
            "stream": True,
        }
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {API_KEY}"}
        asked = urllib.request.Request(servers[0].url + "/generate", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(asked, timeout=60) as lines:
            for line in lines:
                text = line.decode().removeprefix("data:").strip()
                if text and text != "[DONE]":
                    answers.append(json.loads(text))
                    started.set()

    sglang_pair.slow(0.02)
    thread = threading.Thread(target=generate)
    thread.start()
    assert started.wait(30)
    report = synchronise(transport, servers, tensors(folder, 2), "0d0d0d0d-2", verifier=_verifier(folder, 2))
    thread.join(60)
    assert report.failures == {}
    answer = answers[-1]
    spans = answer["meta_info"]["weight_versions"]
    assert [span["version"] for span in spans] == ["0d0d0d0d-1", "0d0d0d0d-2"]
    at, ids = spans[1]["start"], answer["output_ids"]
    found = [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]
    assert len(ids) == len(found) == 110 and 0 < at < 110
    for seed, part in ((1, slice(0, at)), (2, slice(at, None))):
        expected = logprobs(folder, seed, (*prompt, *ids))[len(prompt) - 1 :]
        assert found[part] == pytest.approx(expected[part], abs=TOLERANCE)


def test_a_server_that_has_left_the_group_is_taken_in_again(
    sglang_pair: SGLangWorld, servers: list[HttpReceiver], transport: DistributedTransport
) -> None:
    """As one that was restarted since."""
    folder = sglang_pair.folder
    assert synchronise(transport, servers, tensors(folder, 1), "0e0e0e0e-1").failures == {}
    servers[0].call("/destroy_weights_update_group", {"group_name": transport._groups[0].name}, 20)
    report = synchronise(transport, servers, tensors(folder, 2), "0e0e0e0e-2", verifier=_verifier(folder, 2))
    assert report.failures == {}
    for server in servers:
        _assert_serves(server, folder, 2, "0e0e0e0e-2")


def test_a_server_that_hangs_is_named_in_time_and_the_other_is_sent_everything_again(
    sglang_pair: SGLangWorld, servers: list[HttpReceiver], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(update_group, "LEAVE_SECONDS", 3.0)
    monkeypatch.setattr("asd_megatron.rollout.sglang.weight_sync.synchronise.ALIVE_SECONDS", 4.0)
    monkeypatch.setattr(distributed, "SLACK_SECONDS", 1.0)
    folder, pid = sglang_pair.folder, sglang_pair.pids[0]
    transport = DistributedTransport(CPU, bucket_bytes=SMALL, timeout=4)
    try:
        stream = watched(tensors(folder, 1), 20, lambda: os.kill(pid, signal.SIGSTOP))
        start = time.monotonic()
        report = synchronise(transport, servers, stream, "0f0f0f0f-1", timeout=5)
        assert time.monotonic() - start < 60
        assert set(report.failures) == set(sglang_pair.urls)
        assert report.alive == (servers[1].url,)
        assert servers[1].label() == "0f0f0f0f-1-incomplete"
        report = synchronise(transport, servers, tensors(folder, 1), "0f0f0f0f-1", timeout=3)
        assert set(report.failures) == {servers[0].url}
        _assert_serves(servers[1], folder, 1, "0f0f0f0f-1")
        os.kill(pid, signal.SIGCONT)
        verifier = _verifier(folder, 2)
        report = synchronise(transport, servers, tensors(folder, 2), "0f0f0f0f-2", verifier=verifier)
        assert report.failures == {}
        _assert_serves(servers[0], folder, 2, "0f0f0f0f-2")
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
        transport.close()


def test_a_server_that_is_killed_is_named_and_the_survivor_is_sent_everything_again(
    sglang_pair: SGLangWorld, servers: list[HttpReceiver], transport: DistributedTransport
) -> None:
    folder, seen = sglang_pair.folder, []

    def counted(stream: Any) -> Any:
        for item in stream:
            seen.append(item)
            yield item

    stream = counted(watched(tensors(folder, 1), 20, lambda: os.kill(sglang_pair.pids[0], signal.SIGKILL)))
    start = time.monotonic()
    report = synchronise(transport, servers, stream, "0102abcd-1", verifier=_verifier(folder), timeout=10)
    assert time.monotonic() - start < 30
    assert len(seen) == len(tensors(folder, 1))
    assert set(report.failures) == set(sglang_pair.urls)
    assert report.alive == (servers[1].url,)
    assert servers[1].label() == "0102abcd-1-incomplete"
    again = synchronise(transport, servers[1:], tensors(folder, 1), "0102abcd-1", verifier=_verifier(folder, 1))
    assert again.failures == {}
    _assert_serves(servers[1], folder, 1, "0102abcd-1")

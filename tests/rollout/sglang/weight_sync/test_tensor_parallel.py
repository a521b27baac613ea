"""A real server that cuts its model over two ranks: a tied Llama with one key head, more ranks than that."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from asd_megatron.rollout.sglang.servers.pool import ServerPool
from asd_megatron.rollout.sglang.weight_sync.delta import Deltas, DeltaTransport
from asd_megatron.rollout.sglang.weight_sync.distributed import DistributedTransport
from asd_megatron.rollout.sglang.weight_sync.synchronise import synchronise
from asd_megatron.rollout.sglang.weight_sync.verification import Probe, WeightVerifier
from tests.models.tiny import tiny_llama
from tests.rollout.sglang.sglang_world import START_SECONDS, server_options
from tests.rollout.sglang.weight_sync.world import PROBE_IDS, HttpReceiver, logprobs, partly_changed, tensors

pytestmark = pytest.mark.sglang


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama") / "model", tie_word_embeddings=True, num_key_value_heads=1)


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpReceiver]:
    options = server_options(folder, tensor_parallel=2, environment={"SGLANG_CPU_OMP_THREADS_BIND": "0|0"})
    with ServerPool([options], tmp_path_factory.mktemp("logs"), start_timeout=START_SECONDS) as pool:
        yield HttpReceiver(pool.urls[0], tensor_parallel=2)


def test_both_ranks_have_what_was_sent(server: HttpReceiver, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    transport = DistributedTransport(torch.device("cpu"), bucket_bytes=16_384)
    try:
        for seed in (1, 2):
            verifier = WeightVerifier(config, dtype=torch.float32, device="cpu")
            verifier.probe = Probe(PROBE_IDS, logprobs(folder, seed), 1e-4)
            report = synchronise(transport, [server], tensors(folder, seed), f"0a0b0c0d-{seed}", verifier=verifier)
            assert report.failures == {}
            assert report.checked == 2 * (4 * 6 + 2)  # of two ranks: six tensors of four layers, embedding, norm
            assert not report.probes[server.url].exceeded
            assert server.label() == f"0a0b0c0d-{seed}"
        deltas, sent = Deltas(full_every=2), tensors(folder, 3)
        verifier = WeightVerifier(config, dtype=torch.float32, device="cpu")
        for number in (3, 4):
            deltas.expect({server.url: server.label()})
            report = synchronise(
                DeltaTransport(transport, deltas), [server], sent, f"0a0b0c0d-{number}", verifier=verifier
            )
            assert report.failures == {} and report.checked == 2 * (4 * 6 + 2)
            assert deltas.full is (number == 3) and (deltas.full or deltas.sent_bytes < 0.3 * report.bytes)
            sent = partly_changed(sent, number)
    finally:
        transport.close()

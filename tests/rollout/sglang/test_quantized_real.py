"""Real servers with block-wise FP8 weights: updates over every transport, verification, and what the probe's tolerance
tells apart. On the CPU SGLang loads and keeps such weights itself; only its matrix products are replaced
(`tools/sglang_env/asd_cpu_fp8.py`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from asd_megatron.rollout.sglang.servers.pool import ServerPool
from asd_megatron.rollout.sglang.weight_sync.cuda_ipc import REBUILD_ARGUMENTS, CudaIpcTransport
from asd_megatron.rollout.sglang.weight_sync.delta import Deltas, DeltaTransport
from asd_megatron.rollout.sglang.weight_sync.disk import DiskTransport
from asd_megatron.rollout.sglang.weight_sync.distributed import DistributedTransport
from asd_megatron.rollout.sglang.weight_sync.protocol import NamedTensors, Receiver, Transport, VerificationError
from asd_megatron.rollout.sglang.weight_sync.quantize import quantized, write_model_without_weights
from asd_megatron.rollout.sglang.weight_sync.synchronise import SyncReport, synchronise
from asd_megatron.rollout.sglang.weight_sync.verification import Probe, WeightVerifier
from asd_megatron.run.serving import QUANTIZED_TOLERANCE
from tests.models import tiny
from tests.rollout.sglang.sglang_world import START_SECONDS, server_options
from tests.rollout.sglang.weight_sync.world import HttpReceiver, Named, logprobs, partly_changed, tensors

pytestmark = [pytest.mark.sglang, pytest.mark.slow]  # the e2e test of a quantised server runs in every suite
PROBE = tuple(5 + 11 * i % 53 for i in range(100))
SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "initializer_range": 0.06,
}
FAMILIES: dict[str, tuple[Callable[..., Path], dict[str, Any], int]] = {
    "qwen2": (tiny.tiny_qwen2, {}, 1),
    "qwen3_moe": (tiny.tiny_qwen3_moe, {"moe_intermediate_size": 256}, 2),
}
"""Of each: the folder, sizes, tensor-parallel ranks of its server. One has biases, one experts."""


@dataclass(frozen=True)
class Served:
    """A server, and the folder of the model that it serves."""

    folder: Path
    receiver: HttpReceiver

    def weights(self, seed: int) -> Named:
        return [(name, tensor.bfloat16()) for name, tensor in tensors(self.folder, seed)]

    def verifier(self, seed: int) -> WeightVerifier:
        config = json.loads((self.folder / "config.json").read_text())
        probe = Probe(PROBE, logprobs(self.folder, seed, PROBE), QUANTIZED_TOLERANCE)
        return WeightVerifier(config, dtype=torch.bfloat16, device="cpu", probe=probe)

    def update(self, transport: Transport, seed: int, sent: NamedTensors | None = None) -> SyncReport:
        """Weights of `seed`, verified as such; `sent`: FP8 tensors in their place, as if they were the trainer's."""
        sent = quantized(self.weights(seed)) if sent is None else sent
        return synchronise(transport, [self.receiver], sent, f"0a0a0a0a-{seed}", verifier=self.verifier(seed))


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Served]]:
    """One a family, without weights until the first update."""
    folders, options = [], []
    for name, (make, over, ranks) in FAMILIES.items():
        at = tmp_path_factory.mktemp(name)
        folders.append(make(at / "model", **SIZES, **over))
        options.append(
            server_options(
                write_model_without_weights(folders[-1], at / "served", torch.bfloat16),
                dtype="bfloat16",
                tensor_parallel=ranks,
                arguments={"load-format": "dummy", "skip-server-warmup": True},
                environment={"SGLANG_CPU_OMP_THREADS_BIND": "|".join("0" * ranks)},
            )
        )
    with ServerPool(options, tmp_path_factory.mktemp("logs"), start_timeout=START_SECONDS) as pool:
        receivers = [HttpReceiver(url, o.tensor_parallel) for url, o in zip(pool.urls, options, strict=True)]
        yield {name: Served(*pair) for name, *pair in zip(FAMILIES, folders, receivers, strict=True)}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_transport_brings_weights_that_are_verified(
    family: str, servers: dict[str, Served], tmp_path: Path
) -> None:
    served = servers[family]
    transports: list[Transport] = [
        DistributedTransport(torch.device("cpu"), bucket_bytes=200_000),
        CudaIpcTransport(REBUILD_ARGUMENTS, device=torch.device("cpu"), bucket_bytes=200_000),
        DiskTransport(tmp_path / "weights", served.folder, quantized=True, max_shard_bytes=500_000),
    ]
    for seed, transport in enumerate([*transports, transports[0]], start=1):
        report = served.update(transport, seed)
        assert report.failures == {} and report.checked > 0
        difference = report.probes[served.receiver.url]
        assert 0.02 < difference.mean < QUANTIZED_TOLERANCE, "FP8 was computed with, and no more than that is wrong"
        assert report.bytes < 0.7 * sum(t.numel() * t.element_size() for _, t in served.weights(seed))
    deltas, sent = Deltas(full_every=2), served.weights(1)
    verifier = served.verifier(1)
    verifier.probe = None
    for number in (5, 6):
        deltas.expect({served.receiver.url: served.receiver.label()})
        report = synchronise(
            DeltaTransport(transports[0], deltas),
            [served.receiver],
            quantized(sent),
            f"0a0a0a0a-{number}",
            verifier=verifier,
        )
        assert report.failures == {} and report.checked > 0 and deltas.full is (number == 5)
        sent = partly_changed(sent, number)
    assert deltas.sent_bytes < 0.4 * report.bytes
    transports[0].close()


class Spoiling:
    """The transport with `spoil` applied to what it is given, behind the verifier's back."""

    needs_session = True

    def __init__(self, transport: Transport, spoil: Callable[[NamedTensors], NamedTensors]) -> None:
        self._transport, self._spoil = transport, spoil

    def send(self, receivers: Sequence[Receiver], stream: NamedTensors, label: str) -> dict[str, str]:
        return self._transport.send(receivers, self._spoil(stream), label)

    def close(self) -> None: ...


def test_stale_weights_and_stale_scales_are_found(servers: dict[str, Served]) -> None:
    """Whatever the tolerance: what a server has is compared bit for bit."""
    served, transport = servers["qwen3_moe"], DistributedTransport(torch.device("cpu"))
    served.update(transport, 5)
    old = dict(quantized(served.weights(5)))

    def stale(part: str) -> Callable[[NamedTensors], NamedTensors]:
        return lambda stream: [(name, old[name] if part in name else tensor) for name, tensor in stream]

    for part, named in (
        ("layers.3.mlp.experts.2.down_proj.weight_scale_inv", r"layers\.3\.mlp\.experts\.w2_weight differs"),
        ("layers.1.self_attn.k_proj.weight", r"layers\.1\.self_attn\.qkv_proj\.weight differs"),
    ):
        with pytest.raises(VerificationError, match=named):
            served.update(Spoiling(transport, stale(part)), 6)
    assert served.update(transport, 6).failures == {}
    transport.close()


def test_the_tolerance_tells_rounding_from_wrong_scales(servers: dict[str, Served]) -> None:
    """A format that the trainer and the server understand differently passes the checksums, not the probe."""
    served, transport = servers["qwen2"], DistributedTransport(torch.device("cpu"))

    def scales(change: Callable[[Tensor], Tensor]) -> NamedTensors:
        for name, tensor in quantized(served.weights(7)):
            yield name, change(tensor) if name.endswith("_scale_inv") else tensor

    garbage: dict[str, Callable[[Tensor], Tensor]] = {
        "inverse": torch.reciprocal,
        "none": torch.ones_like,
        "twice": lambda s: 2 * s,
    }
    right = served.update(transport, 7).probes[served.receiver.url].mean
    found = {name: served.update(transport, 7, scales(change)) for name, change in garbage.items()}
    means = {name: report.probes[served.receiver.url].mean for name, report in found.items()}
    assert all(report.checked > 0 and report.probes[served.receiver.url].exceeded for report in found.values()), means
    print(f"mean difference (nats): right {right:.3f}, wrong {means}")
    assert right < QUANTIZED_TOLERANCE / 2
    transport.close()

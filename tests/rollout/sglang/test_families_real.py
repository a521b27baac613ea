"""Real servers of every family but Qwen3 (whose servers the other tests share): their weights are replaced and verified
in whatever layout the server keeps them, and those with experts say which ones they chose."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from asd_megatron.rollout.sglang.client.api import Generation, SGLangServer, new_session
from asd_megatron.rollout.sglang.client.routing import SERVER_ARGUMENT, Routing
from asd_megatron.rollout.sglang.servers.pool import ServerPool
from asd_megatron.rollout.sglang.weight_sync.delta import Deltas, DeltaTransport
from asd_megatron.rollout.sglang.weight_sync.disk import DiskTransport
from asd_megatron.rollout.sglang.weight_sync.distributed import DistributedTransport
from asd_megatron.rollout.sglang.weight_sync.protocol import NamedTensors, Receiver, VerificationError
from asd_megatron.rollout.sglang.weight_sync.synchronise import synchronise
from asd_megatron.rollout.sglang.weight_sync.verification import Probe, WeightVerifier
from tests.models import tiny
from tests.rollout.sglang.sglang_world import API_KEY, START_SECONDS, server_options
from tests.rollout.sglang.weight_sync.world import HttpReceiver, logprobs, model, partly_changed, tensors

pytestmark = pytest.mark.sglang
TOLERANCE = 1e-4
PROBE = tuple(5 + 11 * i % 53 for i in range(40))  # beyond Olmo 3's window of 8 and YaRN's original length of 16


def _qwen3_moe(folder: Path) -> Path:
    """One key head for two ranks, and experts whose width is no multiple of what a rank on the CPU holds."""
    return tiny.tiny_qwen3_moe(folder, num_key_value_heads=1)


def _olmo3(folder: Path) -> Path:
    """With the RoPE settings of a published config.json, which SGLang reads."""
    tiny.tiny_olmo3(folder)
    config = json.loads((folder / "config.json").read_text())
    full = config.pop("rope_parameters")["full_attention"]
    config |= {"rope_theta": full.pop("rope_theta"), "rope_scaling": full}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


FAMILIES: dict[str, Callable[[Path], Path]] = {
    "qwen3_moe": _qwen3_moe,
    "olmo3": _olmo3,
    "qwen2": tiny.tiny_qwen2,
    "mistral": tiny.tiny_mistral,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make(tmp_path_factory.mktemp(name) / "model") for name, make in FAMILIES.items()}


@pytest.fixture(scope="module")
def servers(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, HttpReceiver]]:
    """One of each family; that with experts has two ranks."""
    options = []
    for name, folder in folders.items():
        over: dict[str, Any] = {"arguments": {"skip-server-warmup": True}}  # it would be text; see tiny_qwen2
        if name == "qwen3_moe":
            over["arguments"][SERVER_ARGUMENT] = True
            over |= {"tensor_parallel": 2, "environment": {"SGLANG_CPU_OMP_THREADS_BIND": "0|0"}}
        options.append(server_options(folder, **over))
    with ServerPool(options, tmp_path_factory.mktemp("logs"), start_timeout=START_SECONDS) as pool:
        ranks = [given.tensor_parallel for given in options]
        yield {name: HttpReceiver(url, n) for name, url, n in zip(folders, pool.urls, ranks, strict=True)}


def _verifier(folder: Path, seed: int) -> WeightVerifier:
    config = json.loads((folder / "config.json").read_text())
    probe = Probe(PROBE, logprobs(folder, seed, PROBE), TOLERANCE)
    return WeightVerifier(config, dtype=torch.float32, device="cpu", probe=probe)


@pytest.mark.parametrize("family", FAMILIES)
def test_new_weights_are_verified_and_computed_with(
    family: str, folders: dict[str, Path], servers: dict[str, HttpReceiver], tmp_path: Path
) -> None:
    folder, server = folders[family], servers[family]
    transport = DistributedTransport(torch.device("cpu"), bucket_bytes=16_384)
    for seed, sender in ((1, transport), (2, DiskTransport(tmp_path / "weights", folder, max_shard_bytes=50_000))):
        report = synchronise(
            sender, [server], tensors(folder, seed), f"0a0a0a0a-{seed}", verifier=_verifier(folder, seed)
        )
        assert report.failures == {} and report.checked > 0
        assert report.probes[server.url].maximum < TOLERANCE
    deltas, sent = Deltas(full_every=2), tensors(folder, 1)
    for number in (3, 4):
        verifier = WeightVerifier(json.loads((folder / "config.json").read_text()), dtype=torch.float32, device="cpu")
        deltas.expect({server.url: server.label()})
        report = synchronise(DeltaTransport(transport, deltas), [server], sent, f"0a0a0a0a-{number}", verifier=verifier)
        assert report.failures == {} and report.checked > 0 and deltas.full is (number == 3)
        sent = partly_changed(sent, number)
    transport.close()


def _swapped(stream: NamedTensors) -> Iterator[tuple[str, Tensor]]:
    """Experts 1 and 4 of layer 2 exchanged."""
    names = {f"model.layers.2.mlp.experts.{a}.": f"model.layers.2.mlp.experts.{b}." for a, b in ((1, 4), (4, 1))}
    for name, tensor in stream:
        at = next((at for at in names if name.startswith(at)), "")
        yield names.get(at, at) + name.removeprefix(at), tensor


def _changed(stream: NamedTensors) -> Iterator[tuple[str, Tensor]]:
    """One weight of one expert a little off."""
    for name, tensor in stream:
        if name == "model.layers.2.mlp.experts.5.up_proj.weight":
            tensor = tensor.clone()
            tensor[-1, -1] += 1e-6
        yield name, tensor


@pytest.mark.parametrize(
    ("spoil", "named"), [(_swapped, r"w13_weight, model\.layers\.2\.mlp\.experts\.w2_weight"), (_changed, "w13_weight")]
)
def test_wrong_experts_are_found(
    spoil: Callable[[NamedTensors], NamedTensors],
    named: str,
    folders: dict[str, Path],
    servers: dict[str, HttpReceiver],
) -> None:
    transport = DistributedTransport(torch.device("cpu"), bucket_bytes=16_384)

    class Spoiling:
        needs_session = True

        def send(self, receivers: Sequence[Receiver], stream: NamedTensors, label: str) -> dict[str, str]:
            return transport.send(receivers, spoil(stream), label)

        def close(self) -> None: ...

    folder, server = folders["qwen3_moe"], servers["qwen3_moe"]
    sent = tensors(folder, 3)
    with pytest.raises(VerificationError, match=rf"model\.layers\.2\.mlp\.experts\.{named} differs; the run stops"):
        synchronise(Spoiling(), [server], sent, "0b0b0b0b-3", verifier=_verifier(folder, 3))
    assert synchronise(transport, [server], sent, "0b0b0b0b-3").failures == {}
    transport.close()


@pytest.mark.parametrize("seed", [4, 5])
def test_the_routed_experts_are_those_of_the_weights(
    seed: int, folders: dict[str, Path], servers: dict[str, HttpReceiver], tmp_path: Path
) -> None:
    """Against transformers' router on the same tokens: of a prompt, of a response, from the cache of these weights and
    not of those before."""
    folder, url = folders["qwen3_moe"], servers["qwen3_moe"].url
    sender = DiskTransport(tmp_path / "weights", folder)
    assert synchronise(sender, [servers["qwen3_moe"]], tensors(folder, seed), f"0c0c0c0c-{seed}").failures == {}
    routing = Routing.of(json.loads((folder / "config.json").read_text()))
    assert routing == Routing(layers=4, experts=6, per_token=2)

    async def run() -> list[tuple[list[int], Generation]]:
        async with new_session() as session:
            server = SGLangServer(url, session, API_KEY)

            async def ask(ids: list[int], new: int) -> list[int]:
                sampling = {"max_new_tokens": new, "temperature": 0.0, "ignore_eos": True}
                answers.append((ids, await server.generate(ids, sampling, routing)))
                return [*ids, *answers[-1][1].output_ids.tolist()]

            answers: list[tuple[list[int], Generation]] = []
            first = await ask([7, 8, 9, 40, 41], 60)
            await ask(first, 12)  # all but its last token is cached
            await ask([11, 12, 13], 1)
            return answers

    for ids, answer in asyncio.run(run()):
        tokens = [*ids, *answer.output_ids]
        with torch.no_grad():
            logits = model(folder, seed)(torch.tensor([tokens]), output_router_logits=True).router_logits
        wanted = torch.stack([layer.topk(2).indices for layer in logits], dim=1)[:-1]
        assert answer.routed_experts is not None, answer.unrouted
        assert answer.routed_experts.shape == (len(tokens) - 1, 4, 2)
        assert np.array_equal(answer.routed_experts, wanted.numpy())

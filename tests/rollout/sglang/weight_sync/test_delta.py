"""Deltas of weights: the format, how a server applies it, when one is sent. Two real servers take them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from asd_megatron.rollout.sglang.servers.plugin import asd_weight_delta as plugin
from asd_megatron.rollout.sglang.servers.plugin.asd_weight_delta import (
    CHUNK,
    FORMAT,
    MARK,
    UNKNOWN,
    ChangedElements,
    Changes,
    integers,
)
from asd_megatron.rollout.sglang.weight_sync import delta
from asd_megatron.rollout.sglang.weight_sync.delta import Deltas, DeltaTransport, SentWeights
from asd_megatron.rollout.sglang.weight_sync.distributed import DistributedTransport
from asd_megatron.rollout.sglang.weight_sync.protocol import NamedTensors, Receiver, VerificationError
from asd_megatron.rollout.sglang.weight_sync.synchronise import SyncReport, synchronise
from asd_megatron.rollout.sglang.weight_sync.verification import WeightVerifier
from tests.rollout.sglang.sglang_world import SGLangWorld
from tests.rollout.sglang.weight_sync.world import FakeReceiver, HttpReceiver, Named, partly_changed, tensors
from tools.processor_seconds import processor_seconds

DTYPES = (torch.bfloat16, torch.float32, torch.float8_e4m3fn)
BYTES = torch.uint8


def bits(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Random bits: NaN of every kind, infinities, both zeros."""
    return torch.randint(0, 256, (*shape, dtype.itemsize), dtype=BYTES, generator=generator).view(dtype)[..., 0]


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(integers(a), integers(b))


@settings(max_examples=30, deadline=None)
@given(
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    dtype=st.sampled_from(DTYPES),
    fraction=st.sampled_from([0.0, 0.01, 0.5, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_base_and_delta_are_the_new_tensor_bit_for_bit(
    shape: list[int], dtype: torch.dtype, fraction: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    old, new = bits(shape, dtype, generator), bits(shape, dtype, generator)
    new = torch.where(torch.rand(shape, generator=generator) < fraction, integers(new), integers(old)).view(dtype)
    kept = SentWeights()
    kept.keep("w", old)
    sent = kept.changes("w", new)
    assert sent.changed == (integers(old) != integers(new)).sum()
    found = Changes.read(sent.encoded_name, sent.payload)
    assert (found.name, found.dtype, found.shape) == ("w", dtype, tuple(shape))
    applied = old.clone()
    applied.copy_(ChangedElements.full(found))
    assert same(applied, new)
    assert kept.changes("w", new).changed == 0, "the copy is the new tensor now"


def test_a_tensor_of_several_chunks_and_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delta, "PIECE", 2 * CHUNK)
    monkeypatch.setattr(delta, "BLOCK_BYTES", 3 * CHUNK)
    old = torch.zeros(5 * CHUNK + 7).bfloat16()
    new = old.clone()
    at = torch.tensor([0, CHUNK - 1, CHUNK, 2 * CHUNK, 4 * CHUNK - 1, 5 * CHUNK + 6])
    new[at] = torch.arange(1, 7).bfloat16()
    kept = SentWeights()
    kept.keep("w", old)
    sent = kept.changes("w", new)
    assert torch.equal(sent.positions(), at) and torch.equal(sent.values(), new[at])
    assert sent.payload.nbytes == 24 + 16 + 16  # six counts, positions and values, each part rounded up to 8 bytes
    assert kept.changes("w", old).changed == 6


VIEWS: list[Callable[[Tensor], Tensor]] = [
    lambda t: t.narrow(0, 10, 20),  # the rows of a rank
    lambda t: t.narrow(1, 35, 35),  # the columns of a rank
    lambda t: t.t().narrow(0, 7, 7).t(),
    lambda t: t.transpose(-2, -1),
    lambda t: t[3:20, 5:60:7],
    lambda t: t.chunk(2, dim=1)[1],
    lambda t: t.split([10, 20])[1].contiguous(),
    lambda t: t.reshape(3, 10, 70)[2].detach(),
    lambda t: t.unsqueeze(0),
    lambda t: t[5],
    lambda t: t.narrow(0, 10, 0),
]


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("view", VIEWS)
def test_a_view_of_a_delta_is_the_delta_of_the_view(view: Callable[[Tensor], Tensor], inference: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    old = torch.randn(30, 70, generator=generator).bfloat16()
    new = torch.where(torch.rand(30, 70, generator=generator) < 0.2, -old, old)
    kept = SentWeights()
    kept.keep("w", old)
    changes = kept.changes("w", new)
    with torch.inference_mode(inference):
        source = view(ChangedElements.full(changes))
        inside = torch.zeros([n + 3 for n in source.shape], dtype=old.dtype)[
            tuple(slice(2, 2 + n) for n in source.shape)
        ]
        for target in (inside, torch.zeros(source.shape, dtype=old.dtype), torch.zeros(source.shape)):
            target.copy_(view(old))
            target.data.copy_(source)
            assert torch.equal(target, view(new).to(target.dtype))


@pytest.mark.parametrize(
    "load",
    [
        lambda t: torch.zeros(30, 70).copy_(t + 1),
        lambda t: torch.zeros(30, 70).copy_(t.float()),
        lambda t: torch.cat([t, t]),
        lambda t: torch.zeros(30, 70).copy_(t.mul_(2)),
        lambda t: torch.zeros(2, 30, 70).copy_(t),
        lambda t: torch.zeros(4, 70).copy_(t[:1].expand(4, 70)),
        lambda t: t[0, 0].item(),
    ],
)
def test_what_a_delta_cannot_follow_is_refused(load: Callable[[Tensor], object]) -> None:
    positions = torch.tensor([5])
    changes = Changes.of("w", torch.ones(30, 70).bfloat16(), positions)
    with pytest.raises(NotImplementedError, match=UNKNOWN):
        load(ChangedElements.full(changes))
    with pytest.raises(ValueError, match="bytes of an unknown form"):
        Changes.read(changes.encoded_name, changes.payload[:-1])


def test_a_server_without_the_function_that_is_replaced_says_nothing() -> None:
    answer = SimpleNamespace(internal_state={})  # there is no SGLang here at all
    plugin.announce(answer)
    assert answer.internal_state == {}


class Servers:
    """A transport to servers that load what they are sent as the plugin does. `failing`: URL -> reason, of the next
    transmission."""

    needs_session = True

    def __init__(self, *urls: str) -> None:
        self.receivers = [FakeReceiver(url) for url in urls]
        self.labels = dict.fromkeys(urls, "default")
        self.weights: dict[str, dict[str, Tensor]] = {url: {} for url in urls}
        self.failing: dict[str, str] = {}
        self.names: list[str] = []

    def send(self, receivers: Sequence[Receiver], stream: NamedTensors, label: str) -> dict[str, str]:
        sent = [(name, tensor.clone()) for name, tensor in stream]
        self.names = [name for name, _ in sent]
        for receiver in receivers:
            if receiver.url not in self.failing:
                plugin.load(self._load, self.weights[receiver.url], sent)
                self.labels[receiver.url] = label
        failures, self.failing = self.failing, {}
        self.labels |= dict.fromkeys(failures, f"{label}-incomplete")
        return failures

    def _load(self, weights: dict[str, Tensor], stream: NamedTensors) -> None:
        for name, tensor in stream:
            empty = torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
            weights.setdefault(name, empty).copy_(tensor)

    def close(self) -> None: ...

    def update(self, transport: DeltaTransport, model: Named, label: str, urls: Sequence[str] = ()) -> bool:
        """Whether the update was complete. Every server that it reached has `model` afterwards, bit for bit."""
        receivers = [receiver for receiver in self.receivers if receiver.url in urls or not urls]
        transport.deltas.expect(self.labels)
        failures = transport.send(receivers, iter(model), label)
        for receiver in receivers:
            if receiver.url not in failures:
                assert all(same(self.weights[receiver.url][name], tensor) for name, tensor in model)
        return transport.deltas.full


def test_a_delta_is_sent_to_servers_that_have_its_base_and_all_weights_to_others() -> None:
    generator = torch.Generator().manual_seed(1)
    base: Named = [(f"w{i}", torch.randn(64, 50, generator=generator).bfloat16()) for i in range(3)]
    models = [base]
    for seed in range(20):
        models.append([*partly_changed(models[-1][:2], seed), base[2]])
    servers = Servers("a", "b")
    transport = DeltaTransport(servers, Deltas(full_every=4))
    steps = iter(enumerate(models))

    def update(*urls: str) -> bool:
        number, model = next(steps)
        return servers.update(transport, model, f"L{number}", urls)

    assert [update() for _ in range(6)] == [True, False, False, False, True, False]  # every fourth is complete
    assert [name.rpartition(":")[2] for name in servers.names] == ["w0", "w1"], "w2 has not changed"
    assert transport.deltas.sent_bytes < 0.15 * sum(tensor.nbytes for _, tensor in base)
    assert 0.005 < transport.deltas.changed < 0.03
    servers.labels["b"] = "default"  # it was restarted
    assert update() and not update()
    assert not update("a") and update(), "b has an older version than a"
    assert not update()
    servers.failing = {"b": "broken"}
    assert not update()
    assert update() and not update(), "b was left incomplete"
    transport.deltas.forget()
    assert update() and not update()
    servers.failing = {"a": f"/update_weights_from_distributed: {UNKNOWN}: SGLang uses cat"}
    assert not update()
    assert [update() for _ in range(3)] == [True] * 3, "it would fail every time"


def test_a_tensor_that_has_changed_much_is_sent_as_it_is_and_an_interrupted_stream_is_no_base() -> None:
    servers, old = Servers("a"), [("w", torch.ones(8, 8).bfloat16()), ("v", torch.ones(8, 8).bfloat16())]
    transport = DeltaTransport(servers, Deltas(full_every=9))
    assert servers.update(transport, old, "L0")
    new = [("w", -old[0][1]), old[1]]
    assert not servers.update(transport, new, "L1") and servers.names == ["w"]

    def broken() -> NamedTensors:
        yield new[0]
        raise RuntimeError("the trainer failed")

    transport.deltas.expect(servers.labels)
    with pytest.raises(RuntimeError, match="the trainer failed"):
        transport.send(servers.receivers, broken(), "L2")
    assert servers.update(transport, new, "L2")


@pytest.mark.gpu
def test_tensors_on_a_gpu_are_compared_there_with_pinned_memory() -> None:
    servers, models = Servers("a"), [[("w", torch.randn(3000, 2000).bfloat16()), ("v", torch.randn(64).bfloat16())]]
    models += [partly_changed(models[0], 1), models[0]]
    transport = DeltaTransport(servers, Deltas(full_every=9))
    moved = [[(name, tensor.cuda()) for name, tensor in model] for model in models]
    assert [servers.update(transport, model, f"L{i}") for i, model in enumerate(moved)] == [True, False, False]
    assert 0.015 < transport.deltas.changed < 0.025
    assert all(piece.is_pinned() for pieces in transport.deltas._kept._pieces.values() for piece in pieces)
    assert all(tensor.is_cuda for tensor in servers.weights["a"].values())


@pytest.mark.sglang
def test_a_paused_server_sleeps_until_it_is_asked(sglang_pair: SGLangWorld) -> None:
    for server in range(2):
        assert sglang_pair.admin(server, "/pause_generation", {"mode": "retract"})[0] == 200
    start, used = time.monotonic(), sum(map(processor_seconds, sglang_pair.pids))
    time.sleep(1.0)
    used = sum(map(processor_seconds, sglang_pair.pids)) - used
    assert used < 0.2 * (time.monotonic() - start), "SGLang's loop alone would use a core of each"
    for server in range(2):
        assert sglang_pair.admin(server, "/continue_generation")[0] == 200


@pytest.mark.sglang
def test_real_servers_take_deltas_and_are_sent_everything_when_they_lack_the_base(sglang_pair: SGLangWorld) -> None:
    servers = [HttpReceiver(url) for url in sglang_pair.urls]
    for server in range(2):
        states = sglang_pair.info(server)["internal_states"]
        assert [state.get(MARK) for state in states] == [FORMAT]
    config = json.loads((sglang_pair.folder / "config.json").read_text())
    inner = DistributedTransport(torch.device("cpu"), bucket_bytes=16_384, timeout=20)
    transport = DeltaTransport(inner, Deltas(full_every=4))
    models = [tensors(sglang_pair.folder, 1)]

    def update() -> SyncReport:
        number = len(models)
        models.append(partly_changed(models[-1], number))
        transport.deltas.expect({server.url: server.label() for server in servers})
        verifier = WeightVerifier(config, dtype=torch.float32, device="cpu")
        return synchronise(transport, servers, models[-1], f"0a0a0a0a-{number}", verifier=verifier)

    kinds = []
    for _ in range(5):
        report = update()
        kinds.append(transport.deltas.full)
        assert report.failures == {} and report.checked == 2 * 35
        assert transport.deltas.full or transport.deltas.sent_bytes < 0.2 * report.bytes
    assert kinds == [True, False, False, False, True]
    sglang_pair.restore()  # one that was restarted has the folder's weights under the label "default" too
    assert update().failures == {} and transport.deltas.full
    wrong = models[-1][0][1]
    wrong[3, 3] += 1  # behind the verifier's back: what is kept is no longer what was sent
    transport.deltas._kept.keep(models[-1][0][0], wrong)
    with pytest.raises(VerificationError, match=r"embed_tokens\.weight differs"):
        update()
    transport.deltas.forget()
    models[-1] = models[0]
    assert update().failures == {} and transport.deltas.full
    inner.close()

"""Deltas that each pipeline stage sends of its own tensors: the servers have the trainer's weights bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asd_megatron.checkpoint.huggingface import FolderReader, read_config
from asd_megatron.distributed.layout import Layout
from asd_megatron.models.export import Block, Step
from asd_megatron.rollout.sglang.servers.plugin import asd_weight_delta as plugin
from asd_megatron.rollout.sglang.servers.plugin.asd_weight_delta import integers
from asd_megatron.rollout.sglang.weight_sync.checksums import ServerChecksums, server_pieces
from asd_megatron.rollout.sglang.weight_sync.delta import Deltas
from asd_megatron.rollout.sglang.weight_sync.quantize import quantized
from asd_megatron.rollout.sglang.weight_sync.transfer import Sending
from tests.distributed.harness import run_ranks
from tests.models.tiny import tiny_qwen3, tiny_qwen3_moe
from tests.rollout.sglang.weight_sync.layouts import Trainer
from tests.rollout.sglang.weight_sync.test_transfer import Member
from tests.rollout.sglang.weight_sync.world import FakeReceiver, partly_changed

LAYOUTS = [Layout(tensor=2, pipeline=2), Layout(pipeline=2, data=2, expert=2)]
COMPLETE = [True, False, False, True, False, True, False]
"""Whether each update is: `full_every` is 3, and the fifth one fails."""


class Server(Member):
    """Applies deltas as the plugin does, keeps its label, and answers with the checksums of what it has."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config, self.version = config, "default"
        self.requests: list[tuple[str, list[str]]] = []  # group and names of each bucket

    def _answered(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if path == "/update_weight_version":
            self.version = body["new_version"]
        if path == "/update_weights_from_distributed" and body["names"]:
            self.requests.append((body["group_name"], body["names"]))
        if path == "/weights_checker":
            sums = ServerChecksums(self.config, [1], torch.float32, "cpu")
            for _ in sums.watch((name, self.held[name]) for name in server_pieces(self.config, "cpu")):
                pass
            return {"ranks": [{"parallelism_info": {"tp_rank": 0}, "checksums": sums.expected(1, 0)}]}
        return super()._answered(path, body)

    def label(self) -> str:
        return self.version

    def load(self, received: list[tuple[str, Tensor]]) -> None:
        plugin.load(self._copy, None, received)

    def _copy(self, _: None, received: list[tuple[str, Tensor]]) -> None:
        for name, tensor in received:
            empty = torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
            self.held.setdefault(name, empty).copy_(tensor)


def _updates(rank: int, root: str) -> None:
    for layout in LAYOUTS:
        _update(rank, Path(root) / ("experts" if layout.expert > 1 else "dense"), layout)


def _update(rank: int, folder: Path, layout: Layout) -> None:
    deltas, server = Deltas(full_every=3), Server(read_config(folder))
    trainer = Trainer(folder, layout, "distributed", deltas=deltas)
    with FolderReader(folder) as reader:
        model = [(name, reader[name][:]) for name in reader]
    for number, complete in enumerate(COMPLETE):
        trainer.port.load(dict(model))
        server.requests.clear()
        server.refuses = int(number == 4)
        report = trainer.send([server] if rank == 0 else [], f"0a0a0a0a-{number}")
        assert deltas.full is complete, (number, "every rank knows")
        if report is not None:
            assert list(report.failures) == ([server.url] if number == 4 else []), (number, report.failures)
        if report is not None and not report.failures:
            assert server.held.keys() == dict(model).keys()
            assert all(torch.equal(server.held[name].view(torch.int32), t.view(torch.int32)) for name, t in model)
            assert report.checked > 0 and report.bytes == sum(tensor.nbytes for _, tensor in model)
            assert len({group for group, _ in server.requests}) == 2, "each stage has sent its own"
            names = [name for _, names in server.requests for name in names]
            if not complete:
                assert deltas.sent_bytes < 0.2 * report.bytes and 0.01 < deltas.changed < 0.03
                assert not any("norm" in name for name in names), "they have not changed"
        model = partly_changed(model, number)
    kept = deltas._kept._pieces.keys()
    assert bool(kept) is (rank % layout.stage_size == 0), "nobody but the senders keeps a copy"
    assert any(f"layers.{2 * (rank // layout.stage_size)}." in name for name in kept) is bool(kept)
    assert not any(f"layers.{2 - 2 * (rank // layout.stage_size)}." in name for name in kept)
    trainer.transport.close()


def test_every_stage_sends_what_has_changed_of_its_own(tmp_path: Path) -> None:
    tiny_qwen3(tmp_path / "dense")
    tiny_qwen3_moe(tmp_path / "experts")
    run_ranks(_updates, 4, str(tmp_path))


class Loading:
    """A transport to one server, which loads what it is sent as the plugin does."""

    def __init__(self) -> None:
        self.held: dict[str, Tensor] = {}
        self.buckets = 0

    def run(self, receivers: Any, parcels: Any) -> dict[str, str]:
        for parcel in parcels:
            contents, self.buckets = parcel.contents, self.buckets + 1
            kinds = list(zip(contents.dtypes, contents.shapes, strict=True))
            parts = parcel.bucket.data.split([kind.itemsize * torch.Size(shape).numel() for kind, shape in kinds])
            tensors = [part.view(kind).view(shape) for part, (kind, shape) in zip(parts, kinds, strict=True)]
            plugin.load(self._copy, None, zip(contents.names, tensors, strict=True))
        return {}

    def _copy(self, _: None, received: list[tuple[str, Tensor]]) -> None:
        for name, tensor in received:
            self.held.setdefault(name, torch.zeros(tensor.shape, dtype=tensor.dtype)).copy_(tensor)

    def close(self) -> None: ...


class Matrices:
    """One bucket for each matrix."""

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors

    def named(self) -> list[tuple[str, Tensor]]:
        return [(f"model.layers.{number}.mlp.up_proj.weight", tensor) for number, tensor in enumerate(self.tensors)]

    def steps(self, bucket_bytes: int) -> Iterator[Step]:
        return (Step(0, (Block.of(name, tensor),)) for name, tensor in self.named())


def test_of_fp8_weights_the_changed_values_and_scales_are_sent(process_groups: Any) -> None:
    deltas, transport, server = Deltas(full_every=9), Loading(), FakeReceiver()
    sending = Sending(transport, process_groups.host, (0,), torch.device("cpu"), 2**20, quantize=True, deltas=deltas)
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(256, 128, generator=generator).bfloat16() for _ in range(2))
    for number in range(3):
        transport.buckets = 0
        deltas.expect({server.url: f"L{number - 1}"})
        assert sending.transfer(Matrices(first, second)).take_part([server], f"L{number}") == {}
        expected = dict(quantized(Matrices(first, second).named()))
        assert transport.held.keys() == expected.keys()
        assert all(torch.equal(integers(transport.held[name]), integers(t)) for name, t in expected.items())
        assert (deltas.full, transport.buckets) == (number == 0, 2 if number == 0 else 1), "the first has not changed"
        second = torch.where(torch.rand(second.shape, generator=generator) < 0.01, 2 * second, second)

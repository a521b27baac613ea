"""One transfer on several ranks of a trainer: every rank's own device feeds the servers' ranks on it, every stage sends
what it has, and a failure anywhere ends it on every rank at the same bucket."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from asd_megatron.checkpoint.huggingface import FolderReader, read_config
from asd_megatron.distributed.layout import Layout
from asd_megatron.errors import UserError
from asd_megatron.models.export import Block, Step
from asd_megatron.rollout.sglang.weight_sync import distributed, update_group
from asd_megatron.rollout.sglang.weight_sync.checksums import ServerChecksums, server_pieces
from asd_megatron.rollout.sglang.weight_sync.protocol import TransferIncomplete
from asd_megatron.rollout.sglang.weight_sync.transfer import Sending, Stopped
from tests.distributed.harness import run_ranks
from tests.models.tiny import tiny_qwen3, tiny_qwen3_moe
from tests.rollout.sglang.weight_sync.layouts import Trainer
from tests.rollout.sglang.weight_sync.test_cuda_ipc import _read
from tests.rollout.sglang.weight_sync.world import FakeReceiver
from tests.rollout.toy import one_process_groups

LAYOUTS = [Layout(tensor=2, pipeline=2), Layout(pipeline=2, data=2, expert=2)]


def _weights(folder: Path, factor: int) -> dict[str, Tensor]:
    with FolderReader(folder) as reader:
        return {name: factor * reader[name][:] for name in reader}


class Server(FakeReceiver):
    """Keeps what each of its ranks has loaded, and answers with the checksums of that, as SGLang does."""

    def __init__(self, url: str, tensor_parallel: int, config: dict[str, Any]) -> None:
        super().__init__(url, self._answered)
        self.tensor_parallel, self.config = tensor_parallel, config
        self.ranks: list[dict[str, Tensor]] = [{} for _ in range(tensor_parallel)]
        self.refuses = threading.Event()

    def _answered(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if path == "/update_weights_from_tensor":
            if self.refuses.is_set():
                return {"success": False, "message": "refused on purpose"}
            for held, payload in zip(self.ranks, body["serialized_named_tensors"], strict=True):
                for name, tensor in _read(payload):
                    assert name not in held, "each tensor once"
                    held[name] = tensor
        if path == "/weights_checker":
            return {"ranks": [self._checksums(rank) for rank in range(self.tensor_parallel)]}
        return {}

    def _checksums(self, rank: int) -> dict[str, Any]:
        order = server_pieces(self.config, "cpu")
        sums = ServerChecksums(self.config, [self.tensor_parallel], torch.float32, "cpu")
        for _ in sums.watch((name, self.ranks[rank][name]) for name in order):
            pass
        held = sums.expected(self.tensor_parallel, rank)
        return {"parallelism_info": {"tp_rank": rank}, "checksums": held}


def _colocated(rank: int, root: str) -> None:
    for layout in LAYOUTS:
        _three_servers(rank, Path(root) / ("experts" if layout.expert > 1 else "dense"), layout)


def _three_servers(rank: int, folder: Path, layout: Layout) -> None:
    """On the devices of four ranks."""
    urls = ("http://127.0.0.1:1", "http://127.0.0.1:2", "http://127.0.0.1:3")
    hosts = {urls[0]: (3,), urls[1]: (2, 1), urls[2]: (0,)}
    trainer = Trainer(folder, layout, "cuda_ipc", hosts)
    for seed in (1, 2):
        sent = _weights(folder, seed)
        trainer.port.load(sent)
        servers = [Server(url, len(hosts[url]), read_config(folder)) for url in urls] if rank == 0 else []
        if servers and seed == 2:
            servers[1].refuses.set()
        report = trainer.send(servers, f"0a0a0a0a-{seed}")
        if report is None:
            continue
        assert dict(report.failures) == (
            {urls[1]: "/update_weights_from_tensor: refused on purpose"} if seed == 2 else {}
        )
        assert (report.tensors, report.bytes) == (len(sent), sum(tensor.nbytes for tensor in sent.values()))
        for server in servers:
            if server.url not in report.failures:
                for held in server.ranks:
                    assert held.keys() == sent.keys() and all(torch.equal(held[n], sent[n]) for n in sent)
        assert report.checked > 0


def test_servers_on_the_devices_of_all_ranks_get_every_tensor_of_every_stage(tmp_path: Path) -> None:
    tiny_qwen3(tmp_path / "dense")
    tiny_qwen3_moe(tmp_path / "experts")
    run_ranks(_colocated, 4, str(tmp_path))


def _failing(rank: int, folder: str) -> None:
    """Rank 1 sends the second stage."""
    trainer = Trainer(Path(folder), Layout(pipeline=2), "cuda_ipc", {"http://127.0.0.1:1": (1,)})
    trainer.port.load(_weights(Path(folder), 1))
    receivers = [FakeReceiver("http://127.0.0.1:1")] if rank == 0 else []
    spoiled = trainer.verifier.start([1])
    if rank == 1:
        del spoiled._pieces["model.layers.3.mlp.up_proj.weight"]
        trainer.verifier.start = lambda ranks: spoiled  # type: ignore[method-assign]
    if rank == 0:
        with pytest.raises(UserError, match=r"stores the tensor model\.layers\.3\.mlp\.up_proj\.weight is not known"):
            trainer.send(receivers, "0a0a0a0a-1")
    else:
        assert trainer.send(receivers, "0a0a0a0a-1") is None
    far = [FakeReceiver("http://10.0.0.5:30000")] if rank == 0 else []  # rank 0 refuses before the first bucket
    if rank == 0:
        with pytest.raises(UserError, match="not on this machine's loopback interface"):
            trainer.send(far, "0a0a0a0a-2")
    else:
        assert trainer.send(far, "0a0a0a0a-2") is None
    trainer.send([], "0a0a0a0a-3")  # nobody is left
    lost = TransferIncomplete({"http://127.0.0.1:1": "it did not join"})
    transfer = trainer.sending.transfer(trainer.weights)
    with pytest.raises(TransferIncomplete if rank == 0 else Stopped):  # its server failed, not the run
        transfer.share(None, lost if rank == 1 else None, 1)
    assert sum(len(step.blocks) for step in trainer.weights.steps(2**30)) > 0, "the ranks are in step"


def test_a_failure_on_one_rank_ends_the_transfer_on_all(tmp_path: Path) -> None:
    run_ranks(_failing, 2, str(tiny_qwen3(tmp_path / "model")))


class Member(FakeReceiver):
    """A server that really joins its sender's group, and receives unless it is told to refuse."""

    def __init__(self) -> None:
        super().__init__("http://127.0.0.1:1", self._answered)
        self.groups: dict[str, Any] = {}
        self.held: dict[str, Tensor] = {}
        self.refuses = 0

    def _answered(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        name = body.get("group_name", "")
        if path == "/init_weights_update_group":
            store = dist.TCPStore(body["master_address"], body["master_port"], None, False)
            # as torch nests the keys of a group; not registered, because a sender in this process has its own end
            store = dist.PrefixStore("cpu/", dist.PrefixStore(f"{name}/", dist.PrefixStore(name, store)))
            self.groups[name] = dist.ProcessGroupGloo(store, body["rank_offset"], 2, timedelta(seconds=30))
        if path == "/destroy_weights_update_group":
            del self.groups[name]
        if path == "/update_weights_from_distributed":
            if name not in self.groups:
                return {"success": False, "message": "unknown group"}
            if body["names"] and self.refuses:
                self.refuses -= 1
                return {"success": False, "message": "refused on purpose"}
            if body["names"]:
                kinds = [getattr(torch, dtype) for dtype in body["dtypes"]]
                shapes = [torch.Size(shape) for shape in body["shapes"]]
                sizes = [kind.itemsize * shape.numel() for kind, shape in zip(kinds, shapes, strict=True)]
                flat = torch.empty(sum(sizes), dtype=torch.uint8)
                self.groups[name].broadcast([flat], dist.BroadcastOptions()).wait()
                each = zip(flat.split(sizes), kinds, shapes, strict=True)
                self.load(list(zip(body["names"], (x.view(kind).view(shape) for x, kind, shape in each), strict=True)))
        return {}

    def load(self, received: list[tuple[str, Tensor]]) -> None:
        self.held |= dict(received)


class FromRankOne:
    """Weights that rank 1 has: more than a connection holds."""

    def steps(self, bucket_bytes: int) -> Iterator[Step]:
        for number in range(3):
            tensors = torch.full((2, 2**21), float(number))
            block = Block((f"a{number}", f"b{number}"), tensors[0].shape, (tensors,))
            yield Step(1, (block,) if dist.get_rank() == 1 else ())


def _refused(rank: int) -> None:
    update_group.LEAVE_SECONDS = distributed.SLACK_SECONDS = 1.0
    transport = distributed.DistributedTransport(torch.device("cpu"), timeout=4)
    sending = Sending(transport, one_process_groups().host, (1,), torch.device("cpu"), 2**25)
    server = Member()
    for expected in ({}, {server.url: "/update_weights_from_distributed: refused on purpose"}, {}, {}):
        server.refuses = len(expected)
        server.held.clear()
        begin, transfer = time.monotonic(), sending.transfer(FromRankOne())
        failures = transfer.take_part([server] if rank == 0 else [])
        assert failures == (expected if rank == 0 else {}), (failures, server.paths)
        assert time.monotonic() - begin < 30
        if rank == 0 and not expected:
            assert {name: tensor.unique().tolist() for name, tensor in server.held.items()} == {
                f"{x}{number}": [float(number)] for number in range(3) for x in "ab"
            }
            assert transfer.sent.tensors == 6
    assert rank == 1 or server.paths.count("/init_weights_update_group") == 2, "kept, but for the failure"
    transport.close()


def test_a_server_that_refuses_ends_the_broadcast_of_another_rank() -> None:
    run_ranks(_refused, 2, timeout=100)

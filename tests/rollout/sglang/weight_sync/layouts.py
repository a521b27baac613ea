"""A trainer of several ranks that sends its weights, as the run does: the part of one rank."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from asd_megatron.checkpoint.huggingface import read_config
from asd_megatron.distributed.layout import Layout, init
from asd_megatron.models.port import ModelPort
from asd_megatron.rollout.sglang.weight_sync.cuda_ipc import REBUILD_ARGUMENTS, CudaIpcTransport
from asd_megatron.rollout.sglang.weight_sync.distributed import DistributedTransport
from asd_megatron.rollout.sglang.weight_sync.synchronise import SyncReport, synchronise
from asd_megatron.rollout.sglang.weight_sync.transfer import Sending
from asd_megatron.rollout.sglang.weight_sync.verification import WeightVerifier
from asd_megatron.run.evaluation import Weights

CPU = torch.device("cpu")


class Trainer:
    """One rank. `kind`: distributed or cuda_ipc; `hosts`: of the servers' ranks, with the latter."""

    def __init__(
        self, folder: Path, layout: Layout, kind: str, hosts: Mapping[str, Sequence[int]] | None = None, **over: Any
    ) -> None:
        self.folder, self.groups = folder, init(layout)
        self.port = ModelPort.build(read_config(folder), self.groups, layout, dtype=torch.float32, layers="local")
        self.weights = Weights(self.port)
        config = json.loads((folder / "config.json").read_text())
        self.verifier = WeightVerifier(config, dtype=torch.float32, device="cpu")
        self.transport: DistributedTransport | CudaIpcTransport = (
            DistributedTransport(CPU, timeout=20)
            if kind == "distributed"
            else CudaIpcTransport(REBUILD_ARGUMENTS, device=CPU, world=self.groups.world, hosts=hosts or {}, timeout=20)
        )
        senders = [stage * layout.stage_size for stage in range(layout.pipeline)]
        settings: dict[str, Any] = {"bucket_bytes": 16_384, "verifier": self.verifier} | over
        self.sending = Sending(self.transport, self.groups.host, senders, CPU, **settings)

    def send(self, receivers: Sequence[Any], label: str) -> SyncReport | None:
        """The report, on rank 0. `receivers` counts there alone; with deltas each has to know its `label`."""
        if self.sending.deltas is not None:
            self.sending.deltas.expect({receiver.url: receiver.label() for receiver in receivers})
        transfer = self.sending.transfer(self.weights)
        if self.groups.host.rank() == 0:
            return synchronise(self.transport, receivers, transfer, label, verifier=self.sending.verifier, timeout=20)
        transfer.take_part()
        return None

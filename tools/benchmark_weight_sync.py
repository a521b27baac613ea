"""How long a weight update of two SGLang servers on this machine takes, and a plain gloo broadcast of the same bytes.

Starts two servers of a random Qwen3 for each size (CPU, float32) and needs nothing but the SGLang environment.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from random_qwen3 import random_qwen3
from torch import Tensor

from asd_megatron.errors import UserError
from asd_megatron.files import write_json
from asd_megatron.rollout.sglang.servers.options import ServerOptions
from asd_megatron.rollout.sglang.servers.pool import ServerPool
from asd_megatron.rollout.sglang.servers.process import DIRECT
from asd_megatron.rollout.sglang.weight_sync.buckets import pack
from asd_megatron.rollout.sglang.weight_sync.disk import DiskTransport
from asd_megatron.rollout.sglang.weight_sync.distributed import DistributedTransport
from asd_megatron.rollout.sglang.weight_sync.protocol import Transport
from asd_megatron.rollout.sglang.weight_sync.synchronise import synchronise
from asd_megatron.rollout.sglang.weight_sync.verification import WeightVerifier

SERVERS = 2
KEY = "benchmark"
CPU = torch.device("cpu")
MIB = 2**20


@dataclass(frozen=True)
class Row:
    """One method of sending `megabytes` to both servers, the best of the repetitions."""

    megabytes: float
    method: str
    seconds: float
    gb_per_second: float


@dataclass(frozen=True)
class HttpReceiver:
    url: str
    tensor_parallel: int = 1

    def call(self, path: str, body: dict[str, Any], timeout: float) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
        asked = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        with DIRECT.open(asked, timeout=timeout) as answer:
            return dict(json.load(answer))


def make_model(folder: Path, megabytes: float) -> list[tuple[str, Tensor]]:
    """A folder with the config of a float32 Qwen3 of about that size, and its tensors in export order."""
    vocabulary, layers = 2048, 2 if megabytes < 10 else 6
    hidden = 32
    while 4 * (2 * vocabulary * hidden + layers * 12 * hidden * hidden) < megabytes * 1e6:
        hidden += 32  # 12 h^2 a layer: q and o (2), k and v (1), gate, up and down (9)
    model = random_qwen3(vocabulary=vocabulary, hidden=hidden, layers=layers, head_dim=16, positions=512)
    model.config.save_pretrained(folder)
    return [(name, tensor.detach()) for name, tensor in model.state_dict().items()]


def best_seconds(action: Callable[[int], None], repeats: int) -> float:
    """Of `action(i)`, after one that warms up."""
    times = []
    for number in range(repeats + 1):
        start = time.perf_counter()
        action(number)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _receive(rank: int, port: int, sizes: list[int], rounds: int) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, SERVERS + 1, False)
    dist.init_process_group("gloo", store=store, rank=rank + 1, world_size=SERVERS + 1)
    buffers = [torch.empty(size, dtype=torch.uint8) for size in sizes]
    for _ in range(rounds):
        for buffer in buffers:
            dist.broadcast(buffer, 0)
        dist.barrier()
    dist.destroy_process_group()


def plain_broadcast(tensors: list[tuple[str, Tensor]], bucket_bytes: int, repeats: int) -> float:
    """Seconds for the same buckets to as many processes, which do nothing with them."""
    buckets = [bucket.data.clone() for bucket in pack(tensors, bucket_bytes, CPU)]
    store = dist.TCPStore("127.0.0.1", 0, SERVERS + 1, True, wait_for_workers=False)
    sizes = [bucket.numel() for bucket in buckets]
    peers = mp.spawn(_receive, (store.port, sizes, repeats + 1), nprocs=SERVERS, join=False)
    dist.init_process_group("gloo", store=store, rank=0, world_size=SERVERS + 1)

    def broadcast(_: int) -> None:
        for bucket in buckets:
            dist.broadcast(bucket, 0)
        dist.barrier()

    seconds = best_seconds(broadcast, repeats)
    dist.destroy_process_group()
    peers.join()
    return seconds


def measure(megabytes: float, python: Path, bucket_bytes: int, repeats: int, folder: Path) -> list[Row]:
    """All methods for a model of about that size."""
    model = folder / "model"
    tensors = make_model(model, megabytes)
    size = sum(tensor.numel() * tensor.element_size() for _, tensor in tensors)
    config = json.loads((model / "config.json").read_text())
    arguments = {"skip-tokenizer-init": True, "load-format": "dummy"}
    options = ServerOptions(python=python, model=model, api_key=KEY, admin_key=KEY, arguments=arguments)
    rows = [_row(size, "plain broadcast", plain_broadcast(tensors, bucket_bytes, repeats))]
    with ServerPool([options] * SERVERS, folder / "logs", start_timeout=300) as pool:
        receivers = [HttpReceiver(url) for url in pool.urls]
        transports: dict[str, Transport] = {
            "distributed": DistributedTransport(CPU, bucket_bytes=bucket_bytes),
            "disk": DiskTransport(folder / "weights", model),
        }
        for transport_name, transport in transports.items():
            for verifier in (None, WeightVerifier(config, dtype=torch.float32, device="cpu")):

                def sync(
                    number: int, transport: Transport = transport, verifier: WeightVerifier | None = verifier
                ) -> None:
                    report = synchronise(transport, receivers, tensors, f"00000000-{number}", verifier=verifier)
                    if report.failures:
                        raise UserError(f"the weights did not arrive: {report.failures}")

                name = transport_name if verifier is None else f"{transport_name}, verified"
                rows.append(_row(size, name, best_seconds(sync, repeats)))
            transport.close()
    return rows


def _row(size: int, method: str, seconds: float) -> Row:
    return Row(round(size / 1e6, 1), method, round(seconds, 4), round(size / 1e9 / seconds, 3))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    parser.add_argument("--megabytes", type=float, nargs="+", default=[1, 50, 300], help="sizes (default: 1 50 300)")
    parser.add_argument("--bucket-mib", type=int, default=256, help="size of a bucket (default: 256)")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of which the best counts (default: 5)")
    parser.add_argument("--python", default=".venv-sglang/bin/python", help="interpreter of the SGLang environment")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows: list[Row] = []
    print("| MB | method | seconds | GB/s |\n|---|---|---|---|")
    try:
        for megabytes in arguments.megabytes:
            with tempfile.TemporaryDirectory(prefix="weight-sync-") as folder:
                found = measure(
                    megabytes, Path(arguments.python), arguments.bucket_mib * MIB, arguments.repeats, Path(folder)
                )
            for row in found:
                print(f"| {row.megabytes} | {row.method} | {row.seconds} | {row.gb_per_second} |", flush=True)
            rows += found
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        write_json(arguments.json, [asdict(row) for row in rows])
    return 0


if __name__ == "__main__":
    sys.exit(main())

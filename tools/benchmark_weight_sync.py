"""How long a weight update of two SGLang servers on this machine takes, and a plain gloo broadcast of the same bytes.

Models with random weights (CPU, float32): Qwen3 of some sizes sent by one rank; one of them from two ranks in each
layout of dense models; a Qwen3-MoE with as many tensors as Qwen3-30B-A3B (48 layers of 128 experts), all of them small,
in each layout of models with experts. Starts two servers for each model and needs nothing but the SGLang environment.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from processor_seconds import processor_seconds

from asd_megatron.checkpoint.huggingface import read_config
from asd_megatron.distributed.layout import Layout, init
from asd_megatron.errors import UserError
from asd_megatron.files import write_json
from asd_megatron.models.port import ModelPort
from asd_megatron.rollout.sglang.servers.options import ServerOptions
from asd_megatron.rollout.sglang.servers.pool import ServerPool
from asd_megatron.rollout.sglang.servers.process import DIRECT
from asd_megatron.rollout.sglang.weight_sync.buckets import Slots, fill, pack
from asd_megatron.rollout.sglang.weight_sync.checksums import ServerChecksums
from asd_megatron.rollout.sglang.weight_sync.cuda_ipc import REBUILD_ARGUMENTS, CudaIpcTransport
from asd_megatron.rollout.sglang.weight_sync.disk import DiskTransport
from asd_megatron.rollout.sglang.weight_sync.distributed import DistributedTransport
from asd_megatron.rollout.sglang.weight_sync.synchronise import synchronise
from asd_megatron.rollout.sglang.weight_sync.transfer import Sending
from asd_megatron.rollout.sglang.weight_sync.verification import WeightVerifier
from asd_megatron.run.evaluation import Weights

SERVERS = 2
KEY = "benchmark"
CPU = torch.device("cpu")
MIB = 2**20
FILLED = {
    "one by one": "filled and hashed one by one, no servers",
    "stacked": "filled and hashed stacked, no servers",
}
BOTH = [f"{kind}{how}" for kind in ("gathered", "distributed", "shared memory") for how in ("", ", verified")]
METHODS = [*BOTH, "disk", "disk, verified"]
DENSE = {
    "one rank": Layout(),
    "tensor 2": Layout(tensor=2),
    "pipeline 2": Layout(pipeline=2),
    "data 2": Layout(data=2),
}
SPARSE = {  # a model with experts needs sequence parallelism beside tensor parallelism
    "one rank": Layout(),
    "tensor 2 expert 2": Layout(tensor=2, expert=2, sequence_parallel=True),
    "pipeline 2": Layout(pipeline=2),
    "data 2 expert 2": Layout(data=2, expert=2),
}
LAYOUTS = DENSE | SPARSE
MODELS = ["sizes", "layouts", "experts"]


@dataclass(frozen=True)
class Row:
    """One method of sending a model to both servers: the best of the repetitions. `ratio`: to the plain broadcast;
    `processor_seconds`: of the trainer's ranks and the servers together."""

    model: str
    layout: str
    method: str
    megabytes: float
    seconds: float
    ratio: float
    processor_seconds: float


@dataclass(frozen=True)
class Work:
    """What the trainer's ranks do. `methods`: names of `METHODS`."""

    model: Path
    layout: Layout
    methods: tuple[str, ...]
    urls: tuple[str, ...]
    bucket_bytes: int
    repeats: int
    folder: Path


@dataclass(frozen=True)
class HttpReceiver:
    url: str
    tensor_parallel: int = 1

    def call(self, path: str, body: dict[str, Any], timeout: float) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
        asked = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)  # noqa: S310 (ours)
        with DIRECT.open(asked, timeout=timeout) as answer:
            return dict(json.load(answer))


def dense_config(megabytes: float) -> dict[str, Any]:
    """A float32 Qwen3 of about that size."""
    vocabulary, layers, hidden = 2048, 2 if megabytes < 10 else 8, 64
    while 4 * (2 * vocabulary * hidden + layers * 12 * hidden * hidden) < megabytes * 1e6:
        hidden += 64  # 12 h^2 a layer: q and o (2), k and v (1), gate, up and down (9); two key heads are a shard
    return _config("qwen3", hidden, layers, vocab_size=vocabulary, intermediate_size=3 * hidden)


def experts_config() -> dict[str, Any]:
    """As many tensors as Qwen3-30B-A3B: 48 layers of 128 experts, 18,432 matrices of experts."""
    experts = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 32, "norm_topk_prob": True}
    return _config("qwen3_moe", 64, 48, vocab_size=256, intermediate_size=64, decoder_sparse_step=1, **experts)


def _config(kind: str, hidden: int, layers: int, **over: Any) -> dict[str, Any]:
    architecture = {"qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}[kind]
    return {
        "model_type": kind,
        "architectures": [architecture],
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 16,
        "num_key_value_heads": hidden // 32,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    } | over


# ---------------------------------------------------------------- the trainer's ranks


def _trainer(rank: int, port: int, work: Work) -> None:
    """One rank of the trainer; rank 0 writes the seconds of each method, and the bytes of the model."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(work.layout.world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    groups = init(work.layout)
    config = read_config(work.model)
    model = ModelPort.build(config, groups, work.layout, dtype=torch.float32, layers="local")
    for chunk in model.chunks:
        for parameter in chunk.parameters():
            parameter.data.normal_(0, 0.02)
    receivers = [HttpReceiver(url) for url in work.urls]
    found = {}
    for method in work.methods if work.layout.world_size == 1 else [m for m in work.methods if m not in FILLED]:
        send, close = _method(method, model, groups, config, receivers, work)
        times = []
        for number in range(work.repeats + 1):
            used = processor_seconds(os.getppid()) if rank == 0 else 0.0
            dist.barrier()
            start = time.perf_counter()
            send(f"00000000-{number}")
            seconds = time.perf_counter() - start
            dist.barrier()
            times.append((seconds, processor_seconds(os.getppid()) - used if rank == 0 else 0.0))
        close()
        found[method] = [min(column) for column in zip(*times[1:], strict=True)]
    if rank == 0:
        write_json(work.folder / "seconds.json", found)
    dist.barrier()
    dist.destroy_process_group()


def _method(
    method: str, model: ModelPort, groups: Any, config: Any, receivers: list[HttpReceiver], work: Work
) -> tuple[Callable[[str], None], Callable[[], None]]:
    """(one update under a label, the end) on this rank."""
    kind, _, verified = method.partition(", ")
    if kind in FILLED:
        return lambda label: _fill(kind == "stacked", model, config, work.bucket_bytes), lambda: None
    verifier = WeightVerifier(config, dtype=torch.float32, device="cpu") if verified else None
    transport: DistributedTransport | CudaIpcTransport | DiskTransport
    if kind == "disk":
        transport = DiskTransport(work.folder / "weights", work.model)
    elif kind == "shared memory":
        hosts = {r.url: (number % groups.world.size(),) for number, r in enumerate(receivers)}
        transport = CudaIpcTransport(
            REBUILD_ARGUMENTS, device=CPU, world=groups.world, hosts=hosts, bucket_bytes=work.bucket_bytes
        )
    else:
        transport = DistributedTransport(CPU, bucket_bytes=work.bucket_bytes)
    source, root = Weights(model), groups.world.rank() == 0
    sending = None
    if not isinstance(transport, DiskTransport) and kind != "gathered":
        senders = [stage * work.layout.stage_size for stage in range(work.layout.pipeline)]
        sending = Sending(transport, groups.host, senders, CPU, work.bucket_bytes, verifier=verifier)

    def send(label: str) -> None:
        weights: Any = iter(source) if sending is None else sending.transfer(source)
        if root:
            report = synchronise(transport, receivers, weights, label, verifier=verifier)
            if report.failures:
                raise UserError(f"the weights did not arrive: {report.failures}")
        elif sending is None:
            for _ in weights:
                pass
        else:
            weights.take_part()

    return send, transport.close


def _fill(stacked: bool, model: ModelPort, config: Any, bucket_bytes: int) -> None:
    """What the trainer does without servers: gathers, fills buckets, and hashes for a server of one rank."""
    sums = ServerChecksums(config, [1], torch.float32, "cpu")
    if not stacked:
        for _ in pack(sums.watch(model.export(bucket_bytes=bucket_bytes)), bucket_bytes, CPU):
            pass
        return
    slots = Slots(bucket_bytes)
    for step in model.export_steps(bucket_bytes=bucket_bytes):
        for block, tensors in fill(step.blocks, slots, CPU)[1]:
            sums.add(block.names, tensors)


# ---------------------------------------------------------------- the plain broadcast


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


def plain_broadcast(size: int, bucket_bytes: int, repeats: int) -> tuple[float, float]:
    """(seconds, processor seconds) for as many bytes in buckets to as many processes, which do nothing with them."""
    sizes = [bucket_bytes] * (size // bucket_bytes) + ([size % bucket_bytes] if size % bucket_bytes else [])
    buckets = [torch.zeros(part, dtype=torch.uint8) for part in sizes]
    store = dist.TCPStore("127.0.0.1", 0, SERVERS + 1, True, wait_for_workers=False)
    peers = mp.spawn(_receive, (store.port, sizes, repeats + 1), nprocs=SERVERS, join=False)
    dist.init_process_group("gloo", store=store, rank=0, world_size=SERVERS + 1)
    times = []
    for _ in range(repeats + 1):
        used, start = processor_seconds(os.getpid()), time.perf_counter()
        for bucket in buckets:
            dist.broadcast(bucket, 0)
        dist.barrier()
        times.append((time.perf_counter() - start, processor_seconds(os.getpid()) - used))
    dist.destroy_process_group()
    peers.join()
    return min(seconds for seconds, _ in times[1:]), min(used for _, used in times[1:])


# ---------------------------------------------------------------- tables


def measure(
    name: str,
    config: dict[str, Any],
    layouts: Sequence[str],
    methods: Sequence[str],
    arguments: argparse.Namespace,
    folder: Path,
) -> Iterator[Row]:
    """All methods in all layouts for one model, on one pair of servers."""
    model, bucket_bytes = folder / "model", arguments.bucket_mib * MIB
    model.mkdir()
    write_json(model / "config.json", config)
    size = _size(model)
    plain, used = plain_broadcast(size, bucket_bytes, arguments.repeats)

    def row(layout: str, method: str, seconds: float, used: float) -> Row:
        megabytes, ratio = round(size / 1e6, 1), round(seconds / plain, 2)
        return Row(name, layout, method, megabytes, round(seconds, 4), ratio, round(used, 2))

    yield row("", "plain broadcast", plain, used)
    server = {"skip-tokenizer-init": True, "load-format": "dummy", "mem-fraction-static": 0.3}
    options = ServerOptions(python=Path(arguments.python), model=model, api_key=KEY, admin_key=KEY, arguments=server)
    with ServerPool([options] * SERVERS, folder / "logs", start_timeout=300) as pool:
        for layout in layouts:
            work = Work(
                model, LAYOUTS[layout], tuple(methods), tuple(pool.urls), bucket_bytes, arguments.repeats, folder
            )
            _train(work)
            for method, measured in json.loads((folder / "seconds.json").read_text()).items():
                yield row(layout, FILLED.get(method, method), *measured)
        checked = []
        for _ in range(arguments.repeats):
            used, start = processor_seconds(os.getpid()), time.perf_counter()
            for url in pool.urls:
                HttpReceiver(url).call("/weights_checker", {"action": "checksum"}, 120)
            checked.append((time.perf_counter() - start, processor_seconds(os.getpid()) - used))
        yield row("", "checksums of both servers, one by one", *min(checked))


def _size(model: Path) -> int:
    """Bytes of the model in float32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return sum(
            4 * p.numel() for p in AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)).parameters()
        )


def _train(work: Work) -> None:
    """Run the trainer's ranks. (`mp.spawn` would wait for the process that looks after shared memory, too.)"""
    context, port = mp.get_context("spawn"), _free_port()
    ranks = [context.Process(target=_trainer, args=(rank, port, work)) for rank in range(work.layout.world_size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    if any(process.exitcode for process in ranks):
        raise UserError(f"the trainer's ranks ended with exit codes {[process.exitcode for process in ranks]}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    parser.add_argument("--models", nargs="*", choices=MODELS, default=MODELS, help="models (default: all)")
    parser.add_argument(
        "--megabytes", type=float, nargs="*", default=[1, 50, 300, 2000], help="sizes (default: 1 50 300 2000)"
    )
    parser.add_argument(
        "--layouts", nargs="*", choices=list(LAYOUTS), default=list(LAYOUTS), help="layouts (default: all)"
    )
    parser.add_argument("--layout-megabytes", type=float, default=300, help="size of a model in layouts (default: 300)")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=METHODS, help="methods (default: all)")
    parser.add_argument("--bucket-mib", type=int, default=256, help="size of a bucket (default: 256)")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of which the best counts (default: 5)")
    parser.add_argument("--python", default=".venv-sglang/bin/python", help="interpreter of the SGLang environment")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    both = [name for name in arguments.methods if name in BOTH]
    alone = [name for name in arguments.methods if not name.startswith("gathered")]
    dense = [name for name in arguments.layouts if name in DENSE]
    sparse = [name for name in arguments.layouts if name in SPARSE]
    models = []
    if "sizes" in arguments.models:
        models += [(f"Qwen3 {size:g} MB", dense_config(size), ["one rank"], alone) for size in arguments.megabytes]
    if "layouts" in arguments.models and dense:
        models.append(("Qwen3 in layouts", dense_config(arguments.layout_megabytes), dense, both))
    if "experts" in arguments.models and sparse:
        models.append(("48 x 128 experts", experts_config(), sparse, [*FILLED, *both]))
    rows: list[Row] = []
    print("| model | layout | method | MB | seconds | ratio | processor seconds |\n|---|---|---|---|---|---|---|")
    try:
        for name, config, layouts, methods in models:
            with tempfile.TemporaryDirectory(prefix="weight-sync-") as folder:
                for row in measure(name, config, layouts, methods, arguments, Path(folder)):
                    print("| " + " | ".join(map(str, asdict(row).values())) + " |", flush=True)
                    rows.append(row)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        write_json(arguments.json, [asdict(row) for row in rows])
    return 0


if __name__ == "__main__":
    sys.exit(main())

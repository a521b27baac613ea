"""Seconds and memory of loading a Hugging Face folder into each layout and of exporting it, beside a copy of its files.

Writes a folder of random bfloat16 weights (or takes one), then starts fresh ranks for each layout, which work in
bfloat16; what they export has to equal it. Memory is the most that a rank used beside its own shard (its parameters).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
from machine_load import machine, others
from torch import Tensor

from asd_megatron.checkpoint.huggingface import (
    FolderReader,
    read_config,
    weight_files,
    write_folder,
    write_weights,
)
from asd_megatron.distributed import device
from asd_megatron.distributed.layout import Layout, init
from asd_megatron.errors import UserError
from asd_megatron.files import atomic_folder, to_json, write_json
from asd_megatron.models.port import ModelPort

LAYOUTS = {
    "tp1": Layout(),
    "tp2": Layout(tensor=2, sequence_parallel=True),
    "pp2": Layout(pipeline=2),
    "ep2": Layout(data=2, expert=2),  # models with experts alone
}
MIB = 2**20
SAMPLE_SECONDS = 0.002
QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 40960,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
SHAPES: dict[str, dict[str, Any]] = {
    # Qwen3-0.6B but for a wider MLP and fewer layers; `layers` is what one adds in parameters
    "qwen3": {**QWEN3, "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 12288},
    # Qwen3-30B-A3B with narrower experts
    "qwen3_moe": {
        **QWEN3,
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "moe_intermediate_size": 384,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "tie_word_embeddings": False,
    },
}


@dataclass(frozen=True)
class RankMemory:
    """MiB of one rank's shard, and the most that an action used beside it: anonymous memory, and with the mapped pages
    of files."""

    shard_mib: float
    anonymous_mib: float
    all_mib: float


@dataclass(frozen=True)
class Row:
    """One action on the complete folder, the best of the repetitions; `ranks` is empty for plain files."""

    action: str
    layout: str
    seconds: float
    gb_per_second: float
    ranks: tuple[RankMemory, ...] = ()


# ---------------------------------------------------------------- memory


def _resident() -> tuple[int, int]:
    """(anonymous, all) resident bytes of this process."""
    pages = [int(field) for field in Path("/proc/self/statm").read_text().split()]
    size = os.sysconf("SC_PAGE_SIZE")
    return (pages[1] - pages[2]) * size, pages[1] * size


class Peaks:
    """Highest resident memory since the start, sampled by a thread; torch's copies let it run."""

    def __enter__(self) -> Peaks:
        self._first = self._highest = _resident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            now = _resident()
            self._highest = (max(self._highest[0], now[0]), max(self._highest[1], now[1]))

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.anonymous, self.all = (b - a for a, b in zip(self._first, self._highest, strict=True))


# ---------------------------------------------------------------- ranks


def _joined(rank: int, ranks: int, store_port: int) -> None:
    device.prepare()
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store_port), TORCHELASTIC_USE_AGENT_STORE="True",
    )  # fmt: skip
    dist.init_process_group("gloo")
    torch.set_num_threads(1)


def _on_ranks(function: Callable[..., Any], ranks: int, *arguments: Any) -> list[Any]:
    """Results of `function(*arguments)` in fresh processes that form a gloo group, by rank."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory(prefix="ranks-") as results:
        context = multiprocessing.get_context("spawn")
        processes = [
            context.Process(target=_rank, args=(function, rank, ranks, store.port, Path(results), arguments))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise UserError("a rank failed; its error is above")
        return [json.loads((Path(results) / f"{rank}").read_text()) for rank in range(ranks)]


def _rank(
    function: Callable[..., Any], rank: int, ranks: int, port: int, results: Path, arguments: tuple[Any, ...]
) -> None:
    _joined(rank, ranks, port)
    (results / f"{rank}").write_text(json.dumps(function(*arguments)))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # a normal exit may abort in the destructor of a group that something still refers to


def _measure_layout(
    folder: str, layout: Layout, target: str, shard_bytes: int, repeats: int, cold: bool
) -> dict[str, Any]:
    """Load and export on this rank: seconds of each repetition, highest memory of all."""
    port = ModelPort.build(read_config(folder), init(layout), layout, dtype=torch.bfloat16, layers="local")
    parameters = [parameter.detach() for chunk in port.chunks for parameter in chunk.parameters()]
    for parameter in parameters:
        parameter.zero_()  # its memory is there from now on, so that what loading uses is beside the shard
    out: dict[str, Any] = {"shard": sum(parameter.nbytes for parameter in parameters)}

    def load() -> None:
        with FolderReader(folder) as tensors:
            port.load(tensors)

    def measured(name: str, action: Callable[[], object]) -> None:
        out[name] = {"seconds": [], "anonymous": 0, "all": 0}
        for _ in range(repeats):
            if dist.get_rank() == 0:
                prepare(weight_files(Path(folder)), cold)
            dist.barrier()
            start = time.perf_counter()
            with Peaks() as peaks:
                action()
                dist.barrier()
            out[name]["seconds"].append(time.perf_counter() - start)
            out[name]["anonymous"] = max(out[name]["anonymous"], peaks.anonymous)
            out[name]["all"] = max(out[name]["all"], peaks.all)

    measured("load", load)
    measured("export", lambda: write_folder(port, folder, target, max_shard_bytes=shard_bytes))
    return out


def _write_random(config: dict[str, Any], folder: str, shard_bytes: int) -> None:
    """A folder of random bfloat16 weights of the config's model, norms near 1."""
    layout = Layout()
    port = ModelPort.build(config, init(layout), layout, dtype=torch.bfloat16, layers="local")
    generator = torch.Generator().manual_seed(0)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, shape in port.expected().items():
            noise = 0.02 * torch.randn(shape, generator=generator)
            yield name, (noise + ("norm" in name)).bfloat16()

    with atomic_folder(folder) as partial:
        (partial / "config.json").write_text(to_json(config, indent=2))
        write_weights(tensors(), partial, shard_bytes)


def _bytes_of(config: dict[str, Any]) -> int:
    """Bytes of a bfloat16 model of the config."""
    layout = Layout()
    port = ModelPort.build(config, init(layout), layout, dtype=torch.bfloat16, layers="local")
    return 2 * sum(torch.Size(shape).numel() for shape in port.expected().values())


# ---------------------------------------------------------------- figures


def make_folder(shape: str, gigabytes: float, folder: Path, shard_bytes: int) -> None:
    """A model folder of at least `gigabytes`: as many layers as that takes, an even number of them."""
    one, two = (_on_ranks(_bytes_of, 1, {**SHAPES[shape], "num_hidden_layers": n})[0] for n in (2, 4))
    layers = 2
    while one + (layers - 2) // 2 * (two - one) < gigabytes * 1e9:
        layers += 2
    _on_ranks(_write_random, 1, {**SHAPES[shape], "num_hidden_layers": layers}, str(folder), shard_bytes)


def forget(files: Sequence[Path]) -> None:
    """Drop the files from the page cache."""
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy_files(files: Sequence[Path], target: Path) -> None:
    """A plain copy that is on the disk when it ends, as an export is."""
    target.mkdir()
    for path in files:
        shutil.copyfile(path, target / path.name)
        with open(target / path.name, "rb") as file:
            os.fsync(file.fileno())


def prepare(files: Sequence[Path], cold: bool) -> None:
    if cold:
        forget(files)
    else:
        read_files(files)


def read_files(files: Sequence[Path]) -> None:
    buffer = bytearray(16 * MIB)
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


@contextmanager
def emptied(folder: Path) -> Iterator[Path]:
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measure(
    folder: Path, layouts: Sequence[str], scratch: Path, *, shard_bytes: int, repeats: int, cold: bool
) -> Iterator[Row]:
    """All rows of one folder. cold: the files are dropped from the page cache before each."""
    files = weight_files(folder)
    size = sum(path.stat().st_size for path in files)

    def row(action: str, layout: str, seconds: float, ranks: Sequence[RankMemory] = ()) -> Row:
        return Row(action, layout, round(seconds, 3), round(size / 1e9 / seconds, 3), tuple(ranks))

    def timed(action: Callable[[], None]) -> float:
        prepare(files, cold)
        start = time.perf_counter()
        action()
        return time.perf_counter() - start

    def copied() -> float:
        with emptied(scratch / "copy") as copy:
            return timed(lambda: copy_files(files, copy))

    yield row("plain read", "", min(timed(lambda: read_files(files)) for _ in range(repeats)))
    yield row("plain copy", "", min(copied() for _ in range(repeats)))
    for name in layouts:
        layout = LAYOUTS[name]
        with emptied(scratch / "export") as target:
            given = (str(folder), layout, str(target), shard_bytes, repeats, cold)
            found = _on_ranks(_measure_layout, layout.world_size, *given)
            for action in ("load", "export"):
                memory = [
                    RankMemory(*(round(x / MIB, 1) for x in (f["shard"], f[action]["anonymous"], f[action]["all"])))
                    for f in found
                ]
                yield row(action, name, min(map(max, zip(*(f[action]["seconds"] for f in found), strict=True))), memory)
            if not _same(files, weight_files(target)):
                raise UserError(f"{name}: the exported tensors differ from those of {folder}")


def _same(files: Sequence[Path], written: Sequence[Path]) -> bool:
    with FolderReader(files[0].parent) as a, FolderReader(written[0].parent) as b:
        return a.keys() == b.keys() and all(torch.equal(a[name][:].bfloat16(), b[name][:]) for name in a)


def line(row: Row) -> str:
    memory = "; ".join(f"{r.shard_mib:,.0f} / {r.anonymous_mib:,.0f} / {r.all_mib:,.0f}" for r in row.ranks)
    return f"| {row.action} | {row.layout} | {row.seconds:.2f} | {row.gb_per_second:.2f} | {memory} |"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    parser.add_argument("--folder", metavar="DIR", help="a model folder (default: one of random weights)")
    parser.add_argument("--shape", choices=SHAPES, default="qwen3", help="of the random model (default: qwen3)")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of random weights, at least (default: 2)")
    parser.add_argument("--shard-mib", type=int, default=1024, help="size of the files written (default: 1024)")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, help="(default: all)")
    parser.add_argument("--scratch", metavar="DIR", help="where files are written (default: a temporary folder)")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of which the best counts (default: 3)")
    parser.add_argument("--cold", action="store_true", help="drop the files from the page cache before each figure")
    arguments = parser.parse_args(argv)
    rows: list[Row] = []
    try:
        with tempfile.TemporaryDirectory(prefix="folders-", dir=arguments.scratch) as scratch, others() as share:
            folder = Path(arguments.folder or Path(scratch) / "model")
            if not arguments.folder:
                print(f"writing {arguments.gigabytes:g} GB of random weights", file=sys.stderr, flush=True)
                make_folder(arguments.shape, arguments.gigabytes, folder, arguments.shard_mib * MIB)
            files = weight_files(folder)
            size = sum(path.stat().st_size for path in files)
            print(
                f"{size / 1e9:.2f} GB in {len(files)} files. Memory, MiB of each rank: shard / anonymous / with files\n"
            )
            print("| action | layout | seconds | GB/s | memory |\n|---|---|---|---|---|", flush=True)
            has_experts = bool(read_config(folder).get("num_experts"))
            layouts = arguments.layouts or [n for n, layout in LAYOUTS.items() if has_experts or layout.expert == 1]
            given = {"shard_bytes": arguments.shard_mib * MIB, "repeats": arguments.repeats, "cold": arguments.cold}
            for row in measure(folder, layouts, Path(scratch), **given):
                print(line(row), flush=True)
                rows.append(row)
            bytes_, model = size, "" if arguments.folder else arguments.shape
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        report = {"model": model, "bytes": bytes_, "files": len(files), "cold": arguments.cold, "rows": rows}
        report["machine"] = {**machine(1), "others": share[0]}
        write_json(arguments.json, {**report, "rows": [asdict(row) for row in rows]})
    return 0


if __name__ == "__main__":
    sys.exit(main())

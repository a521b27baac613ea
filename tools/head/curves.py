"""Time and memory over the number of tokens, the vocabulary and the tensor-parallel ranks."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from head import measure, memory
from head.measure import Clock
from head.ways import WAYS, Problem, Products, fused
from machine_load import machine

from asd_megatron.files import atomic_file
from asd_megatron.ops.vocab_head import VocabShard

POINTS = (1, 2, 4, 8, 16)
RANK_TIMEOUT = timedelta(minutes=10)
MIB = 2**20
Row = dict[str, Any]


def measure_curves(
    tokens: int, vocab: int, width: int, repeats: int, clock: Clock, device: torch.device, dtype: torch.dtype
) -> Row:
    """From an eighth to twice the tokens, and from a quarter to four times the vocabulary at half the tokens."""
    start = machine(torch.get_num_threads())

    def curve(sizes: Sequence[tuple[int, int]]) -> list[Row]:
        return [_point(t, v, width, repeats, clock, device, dtype) for t, v in sizes]

    return {
        "machine": start,
        "hidden": width,
        "over_tokens": curve([(tokens * p // 8, vocab) for p in POINTS]),
        "over_vocabulary": curve([(tokens // 2, vocab * p // 4) for p in POINTS]),
        "over_ranks": over_ranks(tokens, vocab, width, repeats, clock) if device.type == "cpu" else [],
    }


def _point(
    tokens: int, vocab: int, width: int, repeats: int, clock: Clock, device: torch.device, dtype: torch.dtype
) -> Row:
    problem = Problem.random(tokens, vocab, width, device, dtype)
    actions: dict[str, Callable[[], object]] = {name: partial(way, problem) for name, way in WAYS.items()}
    peaks = {name: memory.peak_bytes(action, device) for name, action in actions.items()}  # and warm
    actions["products"] = Products(problem, 512)
    actions["products"]()
    times: dict[str, list[measure.Sample]] = {name: [] for name in actions}
    for _ in range(repeats):
        for name, action in actions.items():
            times[name].append(measure.sample(action, device, clock))
    seconds = {name: statistics.median(sample.seconds for sample in samples) for name, samples in times.items()}
    others = max(sample.others for samples in times.values() for sample in samples)
    print(f"T {tokens}, V {vocab}: others took at most {others:.0%} of the cores", file=sys.stderr, flush=True)
    gradient = problem.weight.numel() * problem.weight.element_size()
    return {
        "tokens": tokens,
        "vocab": vocab,
        "weight_gradient": gradient,
        "seconds": seconds,
        "bytes": peaks,
        "others": others,
    }


def over_ranks(tokens: int, vocab: int, width: int, repeats: int, clock: Clock) -> list[Row]:
    """The fused head on 1 and 2 processes of one thread each, in turn; time of the slowest, memory of the largest."""
    found: dict[int, list[Row]] = {1: [], 2: []}
    for _ in range(repeats):
        for world, rows in found.items():
            rows.append(_quiet_ranks(world, tokens, vocab, width, clock))
    return [
        {"ranks": world} | {key: statistics.median(row[key] for row in rows) for key in ("seconds", "bytes", "others")}
        for world, rows in found.items()
    ]


def _quiet_ranks(world: int, tokens: int, vocab: int, width: int, clock: Clock) -> Row:
    """As `measure.sample`, of processes."""
    deadline = time.monotonic() + clock.patience
    best: Row = {"others": 2.0}
    while True:
        outcome: list[tuple[float, int]] = []
        action = partial(_append_ranks, outcome, world, tokens, vocab, width, clock.processor)
        run = measure.sample(action, torch.device("cpu"), Clock())
        seconds, peak = outcome[0]
        best = min(best, {"seconds": seconds, "bytes": peak, "others": run.others}, key=lambda row: row["others"])
        if clock.processor or best["others"] <= measure.QUIET or time.monotonic() > deadline:
            return best


def _append_ranks(
    outcome: list[tuple[float, int]], world: int, tokens: int, vocab: int, width: int, processor: bool
) -> None:
    """(seconds, bytes) of the fused head on `world` new processes."""
    store = dist.TCPStore("127.0.0.1", 0, world, True, wait_for_workers=False, timeout=RANK_TIMEOUT)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (world, store.port, tokens, vocab, width, folder, processor), nprocs=world)
        results = [torch.load(Path(folder) / str(rank), weights_only=True) for rank in range(world)]
    outcome.append((max(seconds for seconds, _ in results), max(peak for _, peak in results)))


def _rank(rank: int, world: int, port: int, tokens: int, vocab: int, width: int, folder: str, processor: bool) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, world, False, timeout=RANK_TIMEOUT)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=RANK_TIMEOUT)
    device = torch.device("cpu")
    whole = Problem.random(tokens, vocab, width, device, torch.float32)
    rows = vocab // world
    weight = whole.weight[rank * rows : (rank + 1) * rows].clone()
    problem = Problem(
        whole.hidden, weight, whole.target, whole.advantages, VocabShard.of(vocab, rows, dist.group.WORLD)
    )
    peak = memory.peak_bytes(partial(fused, problem), device)
    times = []
    for _ in range(3):
        dist.barrier()
        times.append(measure.sample(partial(fused, problem), device, Clock(processor=processor)).seconds)
    torch.save((min(times), peak), Path(folder) / str(rank))
    dist.barrier()
    dist.destroy_process_group()


def print_curves(report: Row) -> None:
    for title in ("over_tokens", "over_vocabulary"):
        print(f"\n{title.replace('_', ' ')}: seconds; MiB without the weight gradient\n")
        print("| T | V | weight gradient, MiB | products | " + " | ".join(WAYS) + " |")
        print("|---" * (4 + len(WAYS)) + "|")
        for row in report[title]:
            cells = [f"{row['seconds'][n]:.2f} s, {(row['bytes'][n] - row['weight_gradient']) / MIB:.0f}" for n in WAYS]
            start = [row["tokens"], row["vocab"], row["weight_gradient"] // MIB, f"{row['seconds']['products']:.2f} s"]
            print("| " + " | ".join(map(str, start + cells)) + " |")
    print("\nranks of one thread: seconds; MiB a rank\n")
    for row in report["over_ranks"]:
        print(f"| {row['ranks']} | {row['seconds']:.2f} | {row['bytes'] / MIB:.0f} |")


def draw_curves(report: Row, folder: str) -> None:
    """head_tokens.png and head_vocabulary.png: time and memory of every way."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    for title, axis, label in (("over_tokens", "tokens", "tokens T"), ("over_vocabulary", "vocab", "vocabulary V")):
        rows = report[title]
        x = [row[axis] for row in rows]
        fixed = f"V {rows[0]['vocab']:,}" if axis == "tokens" else f"T {rows[0]['tokens']:,}"
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
        for name in ("products", *WAYS):
            style: dict[str, Any] = {"color": "black", "linestyle": ":"} if name == "products" else {"marker": "o"}
            style |= {"linewidth": 2.5} if name == "fused" else {}
            left.plot(x, [row["seconds"][name] for row in rows], label=name.replace("_", " "), **style)
            if name != "products":
                right.plot(x, [(row["bytes"][name] - row["weight_gradient"]) / MIB for row in rows], **style)
        left.set(title="time, seconds", xlabel=label)
        right.set(title="peak memory without the weight gradient, MiB", xlabel=label)
        left.legend()
        for side in (left, right):
            side.set_xscale("log", base=2)
            side.set_xticks(x, [f"{value:,}" for value in x])
            side.set_yscale("log", base=2)
            side.grid(alpha=0.3)
        figure.suptitle(f"log-probs, entropy, loss and gradients; {fixed}, H {report['hidden']:,}")
        with atomic_file(Path(folder) / f"head_{'tokens' if axis == 'tokens' else 'vocabulary'}.png") as path:
            figure.savefig(path, dpi=110, format="png")
        plt.close(figure)

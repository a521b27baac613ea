"""The fused head beside the usual ways: time over the bare matrix products' and peak memory over bf16 logits'.

Every way is first checked against float64, then all are timed in turn, round after round; medians count. See
docs/head.md.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))  # before torch

import torch
from head import measure, memory
from head.curves import draw_curves, measure_curves, print_curves
from head.ways import WAYS, Problem, Products, dense, errors
from machine_load import machine

from asd_megatron.errors import UserError
from asd_megatron.files import write_json

WHOLE, TILED = "products, whole", "products, tiled"
TILE = 512
"""Tokens a chunk of the tiled products: on CPUs faster than whole, since a chunk's logits fit a cache better."""
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def check(problem: Problem, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Errors of every way relative to float64; UserError when one is not right."""
    want = dense(problem)
    found = {name: errors(way(problem), want) for name, way in WAYS.items()}
    for name, values in found.items():
        if max(values.values()) > TOLERANCE[dtype]:
            raise UserError(f"{name} differs from float64 by {values}: its time would mean nothing")
    return found


def time_all(problem: Problem, repeats: int, clock: measure.Clock) -> dict[str, list[measure.Sample]]:
    """Every way and the bare products, in turn, `repeats` times."""
    actions: dict[str, Callable[[], object]] = {name: partial(way, problem) for name, way in WAYS.items()}
    actions |= {WHOLE: Products(problem, len(problem.hidden)), TILED: Products(problem, TILE)}
    for name in (WHOLE, TILED):  # the others have been warmed up by the check
        actions[name]()
    found: dict[str, list[measure.Sample]] = {name: [] for name in actions}
    for number in range(repeats):
        for name, action in actions.items():
            found[name].append(measure.sample(action, problem.hidden.device, clock))
        print(f"round {number + 1} of {repeats}", file=sys.stderr, flush=True)
    return found


def resident(name: str, tokens: int, vocab: int, width: int) -> int | None:
    """Growth of a new process's resident memory when it does `name` once."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_resident, (name, tokens, vocab, width))


def _resident(name: str, tokens: int, vocab: int, width: int) -> int | None:
    device = torch.device("cpu")
    WAYS[name](Problem.random(16, 64, 8, device, torch.float32))  # libraries and threads start
    problem = Problem.random(tokens, vocab, width, device, torch.float32)
    return memory.peak_resident(lambda: WAYS[name](problem))


def benchmark(
    arguments: argparse.Namespace, clock: measure.Clock, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    tokens, vocab, width = arguments.tokens, arguments.vocab, arguments.hidden
    problem = Problem.random(tokens, vocab, width, device, dtype)
    wrong = check(problem, dtype)
    logits = 2 * tokens * vocab  # bytes in bfloat16
    gradient = problem.weight.numel() * problem.weight.element_size()
    peaks = {name: memory.peak_bytes(partial(way, problem), device) for name, way in WAYS.items()}
    residents = {name: resident(name, tokens, vocab, width) if arguments.resident else None for name in WAYS}
    start = machine(torch.get_num_threads())
    samples = time_all(problem, arguments.repeats, clock)
    middle = {name: statistics.median(sample.seconds for sample in found) for name, found in samples.items()}
    whole, tiled = middle.pop(WHOLE), middle.pop(TILED)
    floor = min(whole, tiled)
    report: dict[str, Any] = {
        name: {
            "time_over_floor": round(middle[name] / floor, 3),
            "memory_over_2tv": round(peaks[name] / logits, 3),
            "memory_without_weight_gradient_over_2tv": round((peaks[name] - gradient) / logits, 3),
            "resident_over_2tv": None if residents[name] is None else round(residents[name] / logits, 3),
            "seconds": round(middle[name], 4),
            "exact_entropy": True,
            "error": wrong[name],
        }
        for name in WAYS
    }
    report["floor"] = {"seconds": floor, "whole_seconds": whole, "tiled_seconds": tiled, "tile": TILE}
    report["problem"] = {"tokens": tokens, "vocab": vocab, "hidden": width, "dtype": str(dtype).removeprefix("torch.")}
    report["clock"] = "processor" if clock.processor else "wall"
    report["machine"] = {**start, "load_after": os.getloadavg()}
    report["rounds"] = {name: [sample._asdict() for sample in found] for name, found in samples.items()}
    return report


def print_report(report: dict[str, Any]) -> None:
    machine, problem, floor = report["machine"], report["problem"], report["floor"]
    others = [sample["others"] for samples in report["rounds"].values() for sample in samples]
    print(
        f"T {problem['tokens']}, V {problem['vocab']}, H {problem['hidden']}, {problem['dtype']}; {machine['device']}, "
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}"
    )
    print(
        f"floor: {floor['seconds']:.3f} s, the faster of the products whole ({floor['whole_seconds']:.3f} s) and in "
        f"chunks of {floor['tile']} tokens ({floor['tiled_seconds']:.3f} s)"
    )
    disturbed = f"{statistics.median(others):.0%} of the cores, at most {max(others):.0%}"
    print(f"{report['clock']} time; meanwhile others took {disturbed}\n")
    print("| way | seconds | time over floor | memory over 2TV | without weight gradient | resident over 2TV |")
    print("|---|---|---|---|---|---|")
    for name in WAYS:
        row = report[name]
        print(
            f"| {name} | {row['seconds']:.2f} | {row['time_over_floor']:.2f} | {row['memory_over_2tv']:.2f} "
            f"| {row['memory_without_weight_gradient_over_2tv']:.2f} | {row['resident_over_2tv'] or '-'} |"
        )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    parser.add_argument("--tokens", type=int, default=2048, help="T (default: 2048)")
    parser.add_argument("--vocab", type=int, default=32768, help="V (default: 32768)")
    parser.add_argument("--hidden", type=int, default=1024, help="H (default: 1024)")
    parser.add_argument("--repeats", type=int, default=7, help="rounds of which the median counts (default: 7)")
    parser.add_argument("--patience", type=float, default=0, help="seconds to wait for others, for each time taken")
    parser.add_argument(
        "--processor-time", action="store_true", help="of one thread, for machines that are never quiet"
    )
    parser.add_argument(
        "--resident", action="store_true", help="also growth of resident memory, in new processes (CPU, float32)"
    )
    parser.add_argument("--curves", metavar="FOLDER", help="measure over T, V and ranks instead; plots go there")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 operands (CUDA: always)")
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if arguments.bf16 or device.type == "cuda" else torch.float32
    clock = measure.Clock(arguments.patience, arguments.processor_time)
    sizes = arguments.tokens, arguments.vocab, arguments.hidden
    if clock.processor:
        torch.set_num_threads(1)
    try:
        if arguments.curves:
            report = measure_curves(*sizes, arguments.repeats, clock, device, dtype)
            print_curves(report)
            draw_curves(report, arguments.curves)
        else:
            report = benchmark(arguments, clock, device, dtype)
            print_report(report)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        write_json(arguments.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The fused head beside the usual ways: time over the bare matrix products' and peak memory over bf16 logits'.

Every way is first checked against float64, then all are timed in turn, round after round; medians count. The exact
divergence to a teacher is a way of its own: two products more, and so another floor. On CUDA, the heads of other
packages are measured where they are installed. See docs/head.md.
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
from head.divergence import DivergenceResult, PairProducts, TeacherProblem, dense_divergence, fused_divergence
from head.rivals import find_rivals
from head.ways import WAYS, Problem, Products, Result, dense, errors
from machine_load import machine

from asd_megatron.errors import UserError
from asd_megatron.files import write_json

DIVERGENCE = "divergence"
TILE = 512
"""Tokens a chunk of the tiled products: on CPUs faster than whole, since a chunk's logits fit a cache better."""
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
Actions = dict[str, Callable[[], Any]]


def check(actions: Actions, problem: TeacherProblem, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Errors of every way relative to float64; UserError when one is not right."""
    want = dense(problem.policy)
    found = {name: errors(action(), want, Result._fields) for name, action in actions.items() if name != DIVERGENCE}
    found[DIVERGENCE] = errors(actions[DIVERGENCE](), dense_divergence(problem), DivergenceResult._fields)
    for name, values in found.items():
        if not max(values.values()) <= TOLERANCE[dtype]:
            raise UserError(f"{name} differs from float64 by {values}: its time would mean nothing")
    return found


def time_all(
    actions: Actions, problem: TeacherProblem, repeats: int, clock: measure.Clock
) -> tuple[dict[str, list[measure.Sample]], dict[str, dict[str, Any]]]:
    """(samples of every way, floors): all in turn, `repeats` times. The floors of most ways and of the divergence."""
    tokens, device = len(problem.teacher), problem.teacher.device
    products: Actions = {
        "products, whole": Products(problem.policy, tokens),
        "products, tiled": Products(problem.policy, TILE),
        "pair products, whole": PairProducts(problem, tokens),
        "pair products, tiled": PairProducts(problem, TILE),
    }
    for action in products.values():  # the others have been warmed up by the check
        action()
    samples: dict[str, list[measure.Sample]] = {name: [] for name in actions | products}
    for number in range(repeats):
        for name, action in (actions | products).items():
            samples[name].append(measure.sample(action, device, clock))
        print(f"round {number + 1} of {repeats}", file=sys.stderr, flush=True)
    floors = {}
    for key, kind in (("floor", "products"), ("divergence_floor", "pair products")):
        whole, tiled = (_median(samples[f"{kind}, {form}"]) for form in ("whole", "tiled"))
        floors[key] = {"seconds": min(whole, tiled), "whole_seconds": whole, "tiled_seconds": tiled, "tile": TILE}
    return samples, floors


def _median(samples: Sequence[measure.Sample]) -> float:
    return statistics.median(sample.seconds for sample in samples)


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
    policy = Problem.random(tokens, vocab, width, device, dtype)
    problem = TeacherProblem.of(policy)
    rivals, absent = find_rivals(device)
    actions: Actions = {name: partial(way, policy) for name, way in (WAYS | rivals).items()}
    actions[DIVERGENCE] = partial(fused_divergence, problem)
    wrong = check(actions, problem, dtype)
    logits = 2 * tokens * vocab  # bytes in bfloat16
    gradient = policy.weight.numel() * policy.weight.element_size()
    peaks = {name: memory.peak_bytes(action, device) for name, action in actions.items()}
    residents = {name: resident(name, tokens, vocab, width) if arguments.resident else None for name in WAYS}
    start = machine(torch.get_num_threads())
    if device.type == "cpu":
        start["device"] = "cpu"
    samples, floors = time_all(actions, problem, arguments.repeats, clock)
    report: dict[str, Any] = {}
    for name in actions:
        seconds, grown = _median(samples[name]), residents.get(name)
        floor = floors["divergence_floor" if name == DIVERGENCE else "floor"]["seconds"]
        report[name] = {
            "time_over_floor": round(seconds / floor, 3),
            "memory_over_2tv": round(peaks[name] / logits, 3),
            "memory_without_weight_gradient_over_2tv": round((peaks[name] - gradient) / logits, 3),
            "resident_over_2tv": None if grown is None else round(grown / logits, 3),
            "seconds": round(seconds, 4),
            "exact_entropy": True,
            "error": wrong[name],
        }
    report["ways"], report["absent"] = list(actions), absent
    report |= floors
    report["problem"] = {"tokens": tokens, "vocab": vocab, "hidden": width, "dtype": str(dtype).removeprefix("torch.")}
    report["clock"] = "processor" if clock.processor else "wall"
    report["machine"] = {**start, "load_after": os.getloadavg()}
    report["rounds"] = {name: [sample._asdict() for sample in found] for name, found in samples.items()}
    return report


def print_report(report: dict[str, Any]) -> None:
    machine, problem = report["machine"], report["problem"]
    others = [sample["others"] for samples in report["rounds"].values() for sample in samples]
    print(
        f"T {problem['tokens']}, V {problem['vocab']}, H {problem['hidden']}, {problem['dtype']}; {machine['device']}, "
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}"
    )
    for floor, what in ((report["floor"], "floor"), (report["divergence_floor"], "the divergence's floor")):
        print(
            f"{what}: {floor['seconds']:.3f} s, the faster of the products whole ({floor['whole_seconds']:.3f} s) and "
            f"in chunks of {floor['tile']} tokens ({floor['tiled_seconds']:.3f} s)"
        )
    for name, reason in report["absent"].items():
        print(f"not measured: {name} ({reason})")
    disturbed = f"{statistics.median(others):.0%} of the cores, at most {max(others):.0%}"
    print(f"{report['clock']} time; meanwhile others took {disturbed}\n")
    print("| way | seconds | time over floor | memory over 2TV | without weight gradient | resident over 2TV |")
    print("|---|---|---|---|---|---|")
    for name in report["ways"]:
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
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(default: cuda if there is one, otherwise cpu)")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = torch.bfloat16 if arguments.bf16 or device.type == "cuda" else torch.float32
    clock = measure.Clock(arguments.patience, arguments.processor_time)
    sizes = arguments.tokens, arguments.vocab, arguments.hidden
    if clock.processor:
        torch.set_num_threads(1)
    try:
        if device.type == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: torch finds no CUDA device here; leave the option out or give --device cpu")
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

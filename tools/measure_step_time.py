"""The planner's seconds of a training step beside measured ones, on this machine's CPU cores.

    python tools/measure_step_time.py [--json FILE] [--models dense windows experts] [--clock processor]
                                       [--quiet FRACTION]

The trainer's teacher pass and update run on random weights in several layouts of one and of two ranks, one thread each
(gloo, float32). Each process first measures the rates of the machine (`planner.calibration`), three times in turn with
steps; the shortest times count on both sides. Layouts of one model are ranked by both, and Spearman's correlation of
the ranks says whether the planner would have chosen well.

`--clock processor` takes the processor time of the busiest rank, which others on the machine disturb less. A rank that
waits takes none, so what the planner says of waiting (a pipeline's bubble) is left out then.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from machine_load import machine, others, wait_until_quiet
from step.launch import run
from step_time.models import write

from asd_megatron.distributed.launch import torchrun_command
from asd_megatron.errors import UserError
from asd_megatron.files import write_json

PACK = 512
ONE: dict[str, dict[str, Any]] = {
    "1 rank": {},
    "1 rank, packs of 2,048": {"pack": 4 * PACK},
    "1 rank, recompute full": {"recompute": "full"},
}
TWO: dict[str, dict[str, Any]] = {
    "TP 2": {"layout": {"tensor": 2}},
    "TP 2, sequence parallel": {"layout": {"tensor": 2, "sequence_parallel": True}},
    "PP 2": {"layout": {"pipeline": 2}},
    "PP 2, recompute full": {"layout": {"pipeline": 2}, "recompute": "full"},
    "CP 2": {"layout": {"context": 2}},
    "DP 2": {"layout": {"data": 2}},
    "DP 2, EP 2": {"layout": {"data": 2, "expert": 2}},
}
WITHOUT = {"dense": ("DP 2, EP 2",), "windows": ("DP 2, EP 2",), "experts": ("TP 2",)}
"""Layouts that a model cannot have."""
TIMEOUT = 600.0


@dataclass(frozen=True)
class Row:
    """Seconds by phase. others: the fraction of the cores that other processes took meanwhile."""

    model: str
    layout: str
    measured: dict[str, float]
    predicted: dict[str, float]
    rates: dict[str, float]
    others: float

    @property
    def ratio(self) -> float:
        """Predicted over measured, of both phases together."""
        return sum(self.predicted.values()) / sum(self.measured.values())


def measure(model: str, name: str, spec: Mapping[str, Any], clock: str = "wall") -> Row:
    """One layout, in processes of its own."""
    layout = spec.get("layout", {})
    ranks = 1 if not layout else 2
    cell = {
        "model": model,
        "layout": layout,
        "pack": spec.get("pack", PACK),
        "recompute": spec.get("recompute", "none"),
        "clock": clock,
    }
    with tempfile.TemporaryDirectory(prefix="step-time-") as folder:
        write(model, Path(folder) / model)
        out = Path(folder) / "result.json"
        arguments = [folder, json.dumps(cell), str(out)]
        command = [sys.executable, "-m", "step_time.cell", *arguments]
        if ranks > 1:
            command = torchrun_command(ranks, "step_time.cell", arguments)
        with others() as share:
            run(command, threads=1, timeout=TIMEOUT)
        found = json.loads(out.read_text())
    return Row(model, name, found["measured"], found["predicted"], found["rates"], share[0])


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Pearson's correlation of the ranks; ties share the mean of their ranks. 1: the same order, -1: the reverse."""
    x, y = _ranks(a), _ranks(b)
    middle = (len(x) - 1) / 2
    covariance = sum((p - middle) * (q - middle) for p, q in zip(x, y, strict=True))
    spread = [sum((p - middle) ** 2 for p in ranks) for ranks in (x, y)]
    return covariance / (spread[0] * spread[1]) ** 0.5 if min(spread) > 0 else float("nan")


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(values)
    return [order.index(value) + (order.count(value) - 1) / 2 for value in values]


def correlations(rows: Sequence[Row]) -> dict[str, float]:
    """Of each model's layouts of two ranks, by the seconds of both phases."""
    found = {}
    for model in dict.fromkeys(row.model for row in rows):
        own = [row for row in rows if row.model == model and row.layout in TWO]
        if len(own) > 2:
            predicted, measured = ([sum(getattr(r, side).values()) for r in own] for side in ("predicted", "measured"))
            found[model] = spearman(predicted, measured)
    return found


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = [
        "| model | layout | teacher: measured, predicted | update: measured, predicted | predicted / measured |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        phases = [f"{row.measured[p]:.2f} s, {row.predicted[p]:.2f} s" for p in ("teacher", "update")]
        lines.append(f"| {row.model} | {row.layout} | {' | '.join(phases)} | {row.ratio:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write rows, correlations and machine to this file")
    parser.add_argument("--models", nargs="+", default=list(WITHOUT), choices=list(WITHOUT))
    parser.add_argument("--layouts", nargs="+", default=[*ONE, *TWO], choices=[*ONE, *TWO])
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall")
    parser.add_argument("--quiet", type=float, default=1.0, help="wait until others use less of the cores (0 to 1)")
    arguments = parser.parse_args()
    rows = []
    try:
        for model in arguments.models:
            for name in arguments.layouts:
                if name in WITHOUT[model]:
                    continue
                wait_until_quiet(arguments.quiet, time.monotonic() + TIMEOUT)
                rows.append(measure(model, name, {**ONE, **TWO}[name], arguments.clock))
                print(table(rows[-1:]).splitlines()[-1], f" others {rows[-1].others:.0%}", flush=True)
    except UserError as error:
        sys.exit(f"error: {error}")
    print("\n" + table(rows) + "\n")
    for model, value in correlations(rows).items():
        print(f"Spearman's rank correlation, layouts of two ranks, {model}: {value:.2f}")
    if arguments.json:
        result = {"rows": [asdict(row) for row in rows], "spearman": correlations(rows), "machine": machine(1)}
        write_json(arguments.json, result)


if __name__ == "__main__":
    main()

"""The parity check: an AntiSD update in every parallel layout against one process, comparing the loss, every gradient
and every weight change."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from asd_megatron.checks.cases import write_tiny_model
from asd_megatron.checks.layouts import CELLS, ParityCell
from asd_megatron.errors import UserError
from asd_megatron.files import atomic_write

TOLERANCE = 1e-5
UPDATE_TOLERANCE = 1e-4
"""Weight changes after two Adam steps: Adam divides by the square root of second moments that can be tiny."""
LONG_TOLERANCE = 1e-3
"""Weight changes after eleven Adam steps, eight of them with active clipping: rounding errors feed back into the next
step's loss."""

LAUNCHER_GRACE_SECONDS = 40  # torchrun gives its ranks 30


class ParityError(UserError):
    """A layout failed to run."""


@dataclass(frozen=True)
class ParityResult:
    """Errors of one cell against one process: losses relative to the mean absolute advantage, tensors as
    max |difference| / max |value|. `gradient_error` is None where gradients are sharded."""

    layout: str
    ranks: int
    loss_error: float
    gradient_error: float | None
    worst_gradient: str
    update_error: float
    worst_update: str
    long_run_error: float
    clipped_tokens: float
    passed: bool

    @property
    def max_relative_error(self) -> float:
        """The larger of the loss error and the gradient error; the updates have a tolerance of their own."""
        return _largest([self.loss_error, self.gradient_error or 0.0])


def _largest(errors: Sequence[float]) -> float:
    """The maximum; NaN counts as the largest."""
    return next((e for e in errors if math.isnan(e)), max(errors))


def _worst(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> tuple[float, str]:
    if set(found) != set(expected):
        raise ParityError(f"the cell exported other tensors than one process: {sorted(set(found) ^ set(expected))}")
    worst, where = 0.0, ""
    for name, reference in expected.items():
        scale = float(reference.abs().max())
        error = float((found[name] - reference).abs().max()) / scale if scale else float(found[name].abs().max())
        if math.isnan(error):
            return error, name
        if error > worst:
            worst, where = error, name
    return worst, where


def compare(cell: ParityCell, found: dict[str, Any], expected: dict[str, Any]) -> ParityResult:
    """The errors of a cell's results (`parity_worker.run_cell`) against those of its reference."""
    scale = expected["advantage_scale"]
    pairs = list(zip(found["losses"], expected["losses"], strict=True))
    pairs += list(zip(found["losses_clipped"], expected["losses_clipped"], strict=True))
    loss = _largest([abs(a - b) for a, b in pairs]) / scale
    gradient, worst_gradient = None, ""
    if not cell.distributed_optimizer:  # its gradients are sharded: the updates show them
        gradient, worst_gradient = _worst(found["gradients"], expected["gradients"])
    update, worst_update = _worst(found["updates"], expected["updates"])
    long_run, _ = _worst(found["updates_all"], expected["updates_all"])
    passed = (
        loss <= TOLERANCE
        and (gradient or 0.0) <= TOLERANCE
        and update <= UPDATE_TOLERANCE
        and long_run <= LONG_TOLERANCE
        and found["clipped_tokens"] == expected["clipped_tokens"] > 0
    )
    return ParityResult(
        layout=cell.name,
        ranks=cell.ranks,
        loss_error=loss,
        gradient_error=gradient,
        worst_gradient=worst_gradient,
        update_error=update,
        worst_update=worst_update,
        long_run_error=long_run,
        clipped_tokens=found["clipped_tokens"],
        passed=passed,
    )


def run(
    names: Sequence[str], folder: Path, *, timeout: float = 900, say: Callable[[str], None] = print
) -> list[ParityResult]:
    """Run the named cells, and the single-process references they need, in `folder` and compare. One torchrun for each
    number of ranks. Raises UserError for an unknown name, ParityError when a cell fails to run."""
    unknown = [n for n in names if n not in CELLS]
    if unknown:
        raise UserError(f"no such parity layout: {', '.join(unknown)}; there are {', '.join(CELLS)}")
    references = dict.fromkeys(CELLS[n].reference for n in names)
    wanted = list(dict.fromkeys([*references, *names]))
    for kind in sorted({CELLS[n].model for n in wanted}):
        write_tiny_model(folder / kind, kind)
    for ranks in sorted({CELLS[n].ranks for n in wanted}):
        cells = [n for n in wanted if CELLS[n].ranks == ranks]
        say(f"running on {ranks} rank{'s' if ranks > 1 else ''}: {', '.join(cells)}")
        _launch(ranks, folder, cells, timeout)
    load = lambda n: torch.load(folder / f"{n}.pt", weights_only=True)  # noqa: E731
    return [compare(CELLS[n], load(n), load(CELLS[n].reference)) for n in names if n not in references]


def _launch(ranks: int, folder: Path, cells: Sequence[str], timeout: float) -> None:
    from asd_megatron.distributed.launch import torchrun_command, worker_environment

    command = torchrun_command(ranks, "asd_megatron.checks.parity_worker", [str(folder), *cells])
    log = folder / f"ranks{ranks}.log"
    with log.open("w") as out:
        process = subprocess.Popen(command, env=worker_environment(ranks), stdout=out, stderr=subprocess.STDOUT)
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise ParityError(f"the cells {', '.join(cells)} did not finish within {timeout:.0f} s") from None
        finally:
            _end(process)
    if code:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-40:])
        raise ParityError(f"the cells {', '.join(cells)} failed on {ranks} ranks (exit {code}):\n{tail}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Stop a launcher that still runs: SIGTERM first, so that it can end its ranks, SIGKILL after the grace time."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(LAUNCHER_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def table(results: Sequence[ParityResult]) -> str:
    """The results as text, one line a cell."""
    lines = [f"{'layout':22s} {'ranks':>5s} {'loss':>9s} {'gradients':>10s} {'updates':>9s} {'11 steps':>9s}"]
    for r in results:
        gradient = "sharded" if r.gradient_error is None else f"{r.gradient_error:.1e}"
        verdict = "ok" if r.passed else f"FAILED (worst: {r.worst_gradient or r.worst_update})"
        errors = f"{r.loss_error:9.1e} {gradient:>10s} {r.update_error:9.1e} {r.long_run_error:9.1e}"
        lines.append(f"{r.layout:22s} {r.ranks:5d} {errors}  {verdict}")
    return "\n".join(lines)


def _as_json(cell: dict[str, Any]) -> dict[str, Any]:
    """NaN, which JSON does not have, becomes null."""
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in cell.items()}


def main(names: Sequence[str], json_file: Path | None) -> int:
    """Exit status: 0 when every cell passes, 1 otherwise."""
    names = list(names) or [n for n, cell in CELLS.items() if n != cell.reference]
    with tempfile.TemporaryDirectory(prefix="asd-parity-") as folder:
        results = run(names, Path(folder), say=lambda s: print(s, file=sys.stderr, flush=True))
    print(table(results))
    if json_file is not None:
        cells = [_as_json({**asdict(r), "max_relative_error": r.max_relative_error}) for r in results]
        report = {"tolerance": TOLERANCE, "update_tolerance": UPDATE_TOLERANCE, "cells": cells}
        atomic_write(json_file, json.dumps(report, indent=1) + "\n")
    failed = [r.layout for r in results if not r.passed]
    if failed:
        print(f"parity FAILED in {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0

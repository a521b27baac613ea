"""The parity check: an AntiSD update in every parallel layout against one process, comparing the loss, every gradient
and every weight change."""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from asd_megatron.checks.cases import write_tiny_model
from asd_megatron.checks.layouts import CELLS, ParityCell, cells_of
from asd_megatron.checks.ranks import CheckError, run_module
from asd_megatron.errors import UserError
from asd_megatron.files import atomic_write
from asd_megatron.models.compat import resolve_layers

TOLERANCE = 1e-5
UPDATE_TOLERANCE = 2e-4
"""Weight changes after two Adam steps: Adam divides by the square root of second moments that can be tiny. Rounding
differs between processors: 6e-5 on one, 1.1e-4 on another, for the same layout."""
LONG_TOLERANCE = 1e-3
"""Weight changes after eleven Adam steps, eight of them with active clipping: rounding errors feed back into the next
step's loss."""
ROUNDING_FACTOR = 3.0
"""A bfloat16 layout may be this many times as far from float32 as one process in bfloat16 is: it rounds in other
places, as often."""


@dataclass(frozen=True)
class Tolerances:
    """The largest error that passes, of each kind that `ParityResult` has."""

    loss: float
    gradient: float
    update: float
    long_run: float


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
        return largest([self.loss_error, self.gradient_error or 0.0])


def largest(errors: Sequence[float]) -> float:
    """The maximum; NaN counts as the largest."""
    return next((e for e in errors if math.isnan(e)), max(errors))


def worst_tensor(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> tuple[float, str]:
    """The largest error of a tensor, max |difference| / max |expected value|, and its name."""
    if set(found) != set(expected):
        raise CheckError(f"the cell exported other tensors than one process: {sorted(set(found) ^ set(expected))}")
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
    loss = largest([abs(a - b) for a, b in pairs]) / scale
    gradient, worst_gradient = None, ""
    if not cell.distributed_optimizer:  # its gradients are sharded: the updates show them
        gradient, worst_gradient = worst_tensor(found["gradients"], expected["gradients"])
    update, worst_update = worst_tensor(found["updates"], expected["updates"])
    long_run, _ = worst_tensor(found["updates_all"], expected["updates_all"])
    result = ParityResult(
        layout=cell.name,
        ranks=cell.ranks,
        loss_error=loss,
        gradient_error=gradient,
        worst_gradient=worst_gradient,
        update_error=update,
        worst_update=worst_update,
        long_run_error=long_run,
        clipped_tokens=found["clipped_tokens"],
        passed=found["clipped_tokens"] == expected["clipped_tokens"] > 0,
    )
    allowed = Tolerances(TOLERANCE, TOLERANCE, UPDATE_TOLERANCE, LONG_TOLERANCE)
    return replace(result, passed=result.passed and within(result, allowed))


def compare_bfloat16(
    cell: ParityCell, found: dict[str, Any], expected: dict[str, Any], single: dict[str, Any]
) -> ParityResult:
    """As `compare`, for a cell in bfloat16: its errors may be `ROUNDING_FACTOR` times those of `single`, the results of
    one process in bfloat16. Which tokens are clipped depends on rounding, and so does which experts a token is sent to
    where two are nearly as likely: with experts, losses are judged alone."""
    assert cell.bfloat16_reference is not None
    rounding = compare(CELLS[cell.bfloat16_reference], single, expected)
    allowed = Tolerances(
        ROUNDING_FACTOR * rounding.loss_error,
        ROUNDING_FACTOR * (rounding.gradient_error or 0.0),
        ROUNDING_FACTOR * rounding.update_error,
        ROUNDING_FACTOR * rounding.long_run_error,
    )
    if cell.model == "moe":
        allowed = Tolerances(allowed.loss, math.inf, math.inf, math.inf)
    result = compare(cell, found, expected)
    return replace(result, passed=found["clipped_tokens"] > 0 and within(result, allowed))


def within(result: ParityResult, allowed: Tolerances) -> bool:
    """Whether every error is small enough; NaN is not."""
    return (
        result.loss_error <= allowed.loss
        and (result.gradient_error or 0.0) <= allowed.gradient
        and result.update_error <= allowed.update
        and result.long_run_error <= allowed.long_run
    )


def run(
    names: Sequence[str], folder: Path, *, timeout: float = 900, say: Callable[[str], None] = print
) -> list[ParityResult]:
    """Run the named cells, and the single-process references they need, in `folder` and compare. One torchrun for each
    number of ranks. Raises UserError for an unknown name, CheckError when a cell fails to run."""
    unknown = [n for n in names if n not in CELLS]
    if unknown:
        raise UserError(f"no such parity layout: {', '.join(unknown)}; there are {', '.join(CELLS)}")
    compared_with = (c for n in names for c in (CELLS[n].reference, CELLS[n].bfloat16_reference) if c is not None)
    references = dict.fromkeys(compared_with)
    wanted = list(dict.fromkeys([*references, *names]))
    for kind in sorted({CELLS[n].model for n in wanted}):
        write_tiny_model(folder / kind, kind)
    for ranks in sorted({CELLS[n].ranks for n in wanted}):
        cells = [n for n in wanted if CELLS[n].ranks == ranks]
        say(f"running on {ranks} rank{'s' if ranks > 1 else ''}: {', '.join(cells)}")
        _launch(ranks, folder, cells, timeout)
    return [_result(CELLS[n], folder) for n in names if n not in references]


def _result(cell: ParityCell, folder: Path) -> ParityResult:
    load = lambda n: torch.load(folder / f"{n}.pt", weights_only=True)  # noqa: E731
    found, expected = load(cell.name), load(cell.reference)
    if cell.bfloat16_reference is None:
        return compare(cell, found, expected)
    return compare_bfloat16(cell, found, expected, load(cell.bfloat16_reference))


def _launch(ranks: int, folder: Path, cells: Sequence[str], timeout: float) -> None:
    run_module(
        ranks,
        "asd_megatron.checks.parity_worker",
        [str(folder), *cells],
        folder / f"ranks{ranks}.log",
        timeout=timeout,
        what=f"the cells {', '.join(cells)}",
    )


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


def main(
    names: Sequence[str],
    json_file: Path | None,
    *,
    layers: str = "local",
    dtype: str = "float32",
    ranks: int | None = None,
) -> int:
    """Check the cells `names`, or all of `layers` and `dtype`; with `ranks`, those of so many ranks. Exit status: 0
    when every cell passes, 1 otherwise. Raises UserError when there is none."""
    names = list(names) or cells_of(layers, dtype)
    if ranks is not None:
        known = sorted({CELLS[n].ranks for n in names if n in CELLS})
        names = [n for n in names if n not in CELLS or CELLS[n].ranks == ranks]
        if not names:
            raise UserError(f"none of these parity layouts has {ranks} ranks; they have {', '.join(map(str, known))}")
    if any(CELLS[n].layers == "te" for n in names if n in CELLS):
        resolve_layers("te", getattr(torch, dtype))  # refuses here what every rank would refuse
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

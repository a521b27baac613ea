"""The parity check: real cells on two ranks, and that it fails when it should."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from asd_megatron.checks import parity, parity_worker
from asd_megatron.checks.layouts import CELLS, cells_of
from asd_megatron.checks.parity import ParityResult
from asd_megatron.checks.ranks import CheckError
from asd_megatron.cli import main as cli
from asd_megatron.errors import UserError
from tests.distributed.harness import run_ranks

SOME = ["tp2_sp", "pp2_vpp2", "cp2", "dp2_overlap", "moe_ep2"]
WITHOUT_REFERENCES = cells_of("local", "float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parity")


@pytest.fixture(scope="module")
def results(folder: Path) -> Iterator[list[ParityResult]]:
    """One process by torchrun, as the command starts all; two by a fork, which imports nothing again."""
    torchrun = parity._launch

    def launch(ranks: int, folder: Path, cells: Sequence[str], timeout: float) -> None:
        if ranks == 1:
            torchrun(ranks, folder, cells, timeout)
        else:
            run_ranks(_work, ranks, [str(folder), *cells], timeout=timeout, init=False)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parity, "_launch", launch)
        yield parity.run(SOME, folder, timeout=280, say=lambda _: None)


def _work(rank: int, argv: list[str]) -> None:
    parity_worker.main(argv)


def test_cells_of_two_ranks(results: list[ParityResult]) -> None:
    assert [r.layout for r in results] == SOME
    for r in results:
        assert r.passed and r.ranks == 2 and r.clipped_tokens > 0, parity.table(results)
        assert r.max_relative_error <= 1e-5 and r.update_error <= parity.UPDATE_TOLERANCE and r.update_error > 0
        assert (r.gradient_error is None) == CELLS[r.layout].distributed_optimizer


def files(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A cell's file and its reference's."""
    found, expected = (torch.load(folder / f"{n}.pt", weights_only=True) for n in (name, CELLS[name].reference))
    return found, expected


def _nan_loss(found: dict[str, Any]) -> None:
    found["losses"] = [found["losses"][0], math.nan, *found["losses"][2:]]


def _other_gradient(found: dict[str, Any]) -> None:
    gradient = found["gradients"]["model.layers.1.mlp.up_proj.weight"]
    gradient[3, 4] += 1e-4 * gradient.abs().max()


def _nan_gradient(found: dict[str, Any]) -> None:
    found["gradients"]["lm_head.weight"][0, 0] = math.nan


def _other_update(found: dict[str, Any]) -> None:
    change = found["updates"]["model.norm.weight"]
    change *= 1.001


def _other_clipping(found: dict[str, Any]) -> None:
    found["clipped_tokens"] += 1


@pytest.mark.parametrize(
    ("doctor", "tensor"),
    [
        (_nan_loss, ""),
        (_other_gradient, "model.layers.1.mlp.up_proj.weight"),
        (_nan_gradient, "lm_head.weight"),
        (_other_update, "model.norm.weight"),
        (_other_clipping, ""),
    ],
)
def test_a_difference_fails(
    doctor: Callable[[dict[str, Any]], None], tensor: str, results: list[ParityResult], folder: Path
) -> None:
    found, expected = files(folder, "cp2")
    assert parity.compare(CELLS["cp2"], found, expected).passed
    doctor(found)
    result = parity.compare(CELLS["cp2"], found, expected)
    assert not result.passed
    assert tensor in (result.worst_gradient, result.worst_update) or not tensor
    if doctor is _nan_loss:
        assert math.isnan(result.max_relative_error)


def test_gradients_that_are_missing_fail(results: list[ParityResult], folder: Path) -> None:
    found, expected = files(folder, "cp2")
    found["gradients"] = {}
    with pytest.raises(CheckError, match="other tensors than one process"):
        parity.compare(CELLS["cp2"], found, expected)


def test_exit_status_and_json(
    results: list[ParityResult],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def cells(names: Any, _: Path, **__: Any) -> list[ParityResult]:
        return [parity.compare(CELLS[n], *files(folder, n)) for n in names]

    monkeypatch.setattr(parity, "run", cells)
    report = tmp_path / "parity.json"
    assert cli.main(["parity", *SOME, "--json", str(report)]) == 0
    written = json.loads(report.read_text())
    assert set(written) == {"tolerance", "update_tolerance", "cells"}
    assert [c["layout"] for c in written["cells"]] == SOME
    for cell in written["cells"]:
        assert 0 < cell["max_relative_error"] <= written["tolerance"] == 1e-5
        assert cell["passed"] is True and 0 < cell["update_error"] <= written["update_tolerance"]
    assert "FAILED" not in capsys.readouterr().out

    monkeypatch.setattr(parity, "TOLERANCE", 1e-12)
    assert cli.main(["parity", "cp2", "--json", str(report)]) == 1
    out = capsys.readouterr()
    assert "FAILED (worst: model." in out.out and "parity FAILED in cp2" in out.err
    assert json.loads(report.read_text())["cells"][0]["passed"] is False


def test_layouts_of_a_number_of_ranks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[str] = []
    monkeypatch.setattr(parity, "run", lambda names, *_, **__: asked.extend(names) or [])
    for ranks in (1, 2, 4):
        assert cli.main(["parity", "--ranks", str(ranks)]) == 0
    assert sorted(asked) == sorted(WITHOUT_REFERENCES), "each layout once"
    asked.clear()
    assert cli.main(["parity", "cp2", "tp2_pp2", "--ranks", "4"]) == 0 and asked == ["tp2_pp2"]
    assert cli.main(["parity", "cp2", "--ranks", "3"]) == 2
    assert "3 ranks; they have 2" in capsys.readouterr().err


def test_a_number_that_is_none_is_null_in_json() -> None:
    assert parity._as_json({"a": math.nan, "b": 1.0, "c": None, "d": "x"}) == {"a": None, "b": 1.0, "c": None, "d": "x"}


def test_unknown_layouts_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="no such parity layout: tp3; there are single, "):
        parity.run(["tp2", "tp3"], tmp_path)
    assert cli.main(["parity", "tp3"]) == 2
    assert "error: no such parity layout: tp3" in capsys.readouterr().err


def test_a_launch_that_hangs_or_dies_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def instead(program: str) -> None:
        command = [sys.executable, "-c", program]
        monkeypatch.setattr("asd_megatron.distributed.launch.torchrun_command", lambda *_: command)

    instead("import time; time.sleep(100)")
    with pytest.raises(CheckError, match="cells single did not finish within 1 s"):
        parity.run(["single"], tmp_path, timeout=1, say=lambda _: None)
    instead("raise SystemExit('out of luck')")
    with pytest.raises(CheckError, match=r"cells single failed on 1 ranks \(exit 1\):\nout of luck"):
        parity.run(["single"], tmp_path, say=lambda _: None)


def test_the_cells_that_were_promised() -> None:
    promised = ["tp2", "tp2_sp", "pp2", "pp2_vpp2", "tp2_pp2", "cp2", "dp2", "dp2_distopt", "micro_batches"]
    assert {*promised, "tp2_tied", "dp2_overlap"} <= set(WITHOUT_REFERENCES)
    assert any(c.recompute != "none" for c in CELLS.values())


@pytest.mark.slow
def test_every_cell(tmp_path: Path) -> None:
    results = parity.run(WITHOUT_REFERENCES, tmp_path)
    assert [r.layout for r in results] == WITHOUT_REFERENCES
    assert all(r.passed for r in results), parity.table(results)

"""The models table: real cells, what makes one fail, and the page."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from asd_megatron.checks import models_page, models_table, models_worker
from asd_megatron.checks.bfloat16 import random_pairs
from asd_megatron.checks.model_cells import LAYOUTS, layout_of, read_tasks, write_tasks
from asd_megatron.checks.random_models import FAMILIES
from asd_megatron.cli import main as cli
from asd_megatron.distributed.layout import Layout
from asd_megatron.models.families import families
from tests.distributed.harness import run_ranks


def _work(rank: int, argv: list[str]) -> None:
    models_worker.main(argv)


def fork(ranks: int, module: str, arguments: Sequence[str], log: Path, **_: Any) -> None:
    """In place of torchrun: forks, which import nothing again."""
    assert module == models_worker.__name__
    run_ranks(_work, ranks, list(arguments), timeout=280, init=False)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def report(root: Path) -> Iterator[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models_table, "run_module", fork)
        found = models_table.measure(["qwen3_moe"], ["tp2_ep2"], root, smollm2=None, say=lambda _: None)
        found["drift"] = models_table.drift_rows(["qwen3_moe"], root, None, lambda _: None)
        yield found


def test_a_cell(report: dict[str, Any]) -> None:
    (cell,) = report["cells"]
    assert (cell["family"], cell["layout"], cell["ranks"]) == ("qwen3_moe", "tp2_ep2", 2)
    assert cell["passed"] and cell["round_trip_bitwise"]
    assert 0 < cell["max_logit_difference"] <= report["tolerance"] == 1e-4
    assert 0 < cell["max_gradient_error"] <= report["gradient_tolerance"]
    assert len(cell["peak_memory_mib"]) == 2 and min(cell["peak_memory_mib"]) > 40  # the logits alone have 40
    assert models_table.failed(report) == []


def test_drift(report: dict[str, Any]) -> None:
    (row,) = report["drift"]
    assert row["tokens"] == sum(len(pair.response) for pair in random_pairs(99))
    for name in "stu":
        assert 0 < row[name]["mean_abs_drift"] < row[name]["p99_abs_drift"] < 1
    assert row["u"]["mean_abs_drift"] <= row["s"]["mean_abs_drift"] + row["t"]["mean_abs_drift"]


def test_wrong_weights_are_seen(report: dict[str, Any], root: Path) -> None:
    """A cell whose folder differs from what transformers ran, in one number of one expert; and a folder in bfloat16
    whose numbers are not bfloat16's does not come back."""
    damaged = root / "damaged"
    damaged.mkdir()
    for file in (root / "qwen3_moe").iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    weights = load_file(damaged / "model.safetensors")
    weights["model.layers.2.mlp.experts.7.down_proj.weight"][3, 5] += 0.5
    save_file(weights, damaged / "model.safetensors")
    (task,) = read_tasks(root / "tasks.json")  # the drift's: the last that was written
    parity = replace(
        task,
        kind="parity",
        name="damaged",
        folder=str(damaged),
        sequences=str(root / "qwen3_moe.pt"),
        bfloat16=str(damaged),  # float32 files
    )
    write_tasks(root / "damaged.json", [parity])
    fork(1, models_worker.__name__, [str(root), str(root / "damaged.json")], root / "log")
    found = json.loads((root / "damaged.json").read_text())
    assert found["max_logit_difference"] > 1e-3 and found["max_gradient_error"] > 1e-3
    assert found["round_trip_bitwise"] is False


def _cell(**over: Any) -> dict[str, Any]:
    good = {"max_logit_difference": 1e-6, "max_gradient_error": 1e-6, "round_trip_bitwise": True}
    return {"family": "llama", "layout": "cp2", "ranks": 2, "peak_memory_mib": [None], "seconds": 1.0, **good, **over}


@pytest.mark.parametrize(
    "over",
    [
        {"max_logit_difference": 1.1e-4},
        {"max_logit_difference": None},  # NaN
        {"max_gradient_error": 2e-4},
        {"max_gradient_error": None},
        {"round_trip_bitwise": False},
    ],
)
def test_what_fails(over: dict[str, Any], report: dict[str, Any]) -> None:
    assert models_table._passed(_cell())
    cell = _cell(**over)
    cell["passed"] = models_table._passed(cell)
    assert not cell["passed"]
    failing = {**report, "cells": [*report["cells"], cell]}
    assert models_table.failed(failing) == ["llama cp2"]
    assert "FAILED" in models_page.lines(failing["cells"])
    page = models_page.measured(failing)
    assert "1 of 2 cells pass" in page
    assert ("FAILED" in page) == ("round_trip_bitwise" not in over) or "in 1 of 2" in page


def test_the_command(
    report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(models_table, "measure", lambda *_, **__: dict(report))
    page, json_file = tmp_path / "models.md", tmp_path / "models.json"
    page.write_text(f"# Models\n\n{models_page.BEGIN}\nold figures\n{models_page.END}\n\nwritten by hand\n")
    assert cli.main(["models-table", "--json", str(json_file), "--write", str(page)]) == 0
    assert json.loads(json_file.read_text())["cells"][0]["max_logit_difference"] > 0
    text = page.read_text()
    assert "| TP2 EP2 | " in text and "| qwen3_moe | random ids | 384 |" in text
    assert text.startswith("# Models\n") and text.endswith("\nwritten by hand\n") and "old figures" not in text
    assert "| TP2 EP2 | " in capsys.readouterr().out

    monkeypatch.setitem(report["cells"][0], "passed", False)
    assert cli.main(["models-table", "qwen3_moe"]) == 1
    out = capsys.readouterr()
    assert "FAILED" in out.out and "the models table FAILED in qwen3_moe tp2_ep2" in out.err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["gwen3"], "has no family 'gwen3': did you mean"),
        (["qwen3", "--layouts", "tp3"], "has no layout 'tp3'"),
        (["qwen3", "--layouts", "ep2"], "expert parallelism (ep2, tp2_ep2, ep2_pp2) is of qwen3_moe alone"),
        (["qwen3", "--write", "page.md"], "--write and --smollm2 go with the complete table"),
        (["--folders", "missing.json"], "missing.json"),
    ],
)
def test_refused(argv: list[str], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["models-table", *argv]) == 2
    assert says in capsys.readouterr().err


def test_a_page_without_a_place_for_the_figures_is_refused(
    report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(models_table, "measure", lambda *_, **__: dict(report))
    (tmp_path / "page.md").write_text("# Models\n")
    assert cli.main(["models-table", "--write", str(tmp_path / "page.md")]) == 2
    assert "has no lines" in capsys.readouterr().err


def test_every_family_and_layout_is_in_the_table() -> None:
    assert set(FAMILIES) == {family.name for family in families()}
    assert layout_of("ep2", experts=False) is None and layout_of("tp2_sp", experts=True) is None
    assert layout_of("tp2", experts=True) == Layout(tensor=2, sequence_parallel=True)
    dense = [name for name in LAYOUTS if layout_of(name, experts=False)]
    assert dense == ["single", "tp2", "tp2_sp", "pp2", "pp2_vpp2", "tp2_pp2", "cp2", "dp2"]
    assert [name for name in LAYOUTS if layout_of(name, experts=True)] == [n for n in LAYOUTS if n != "tp2_sp"]


def test_the_page_of_the_documentation_has_its_figures() -> None:
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    figures = text.partition(models_page.BEGIN)[2].partition(models_page.END)[0]
    for name in (*FAMILIES, *models_page.NAMES.values()):
        assert name in figures
    assert "FAILED" not in figures and "differ**" not in figures


def test_peak_memory_counts_what_is_inside() -> None:
    from asd_megatron.checks.memory import STATUS, PeakMemory

    with PeakMemory() as memory:
        torch.ones(32 << 20)  # float32: 128 MiB
    with PeakMemory() as idle:
        pass
    if STATUS.exists():
        assert memory.mib is not None and idle.mib is not None
        assert 127 < memory.mib < 160 and idle.mib < 16

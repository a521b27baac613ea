"""tools/benchmark_head.py at sizes of seconds: every way is right, and the figures have their names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "benchmark_head.py"
WAYS = ("fused", "materialised", "vocab_parallel", "checkpointed", "liger_style")
SIZES = ("--tokens", "96", "--vocab", "300", "--hidden", "32", "--repeats", "1")


def _run(*arguments: str) -> dict[str, Any]:
    path = Path(arguments[-1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(TOOL), *SIZES, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(path.read_text()))


@pytest.mark.parametrize(("options", "tolerance"), [((), 3e-6), (("--bf16",), 2e-2)])
def test_every_way_agrees_with_float64(tmp_path: Path, options: tuple[str, ...], tolerance: float) -> None:
    report = _run(*options, "--json", str(tmp_path / "head.json"))
    for way in WAYS:
        assert set(report[way]["error"]) == {"logprobs", "entropy", "d_hidden", "d_weight"}
        assert max(report[way]["error"].values()) < tolerance, way
        assert report[way]["exact_entropy"]
        assert report[way]["time_over_floor"] > 0
        weight_gradient = 300 * 32 / (96 * 300) * (1 if options else 2)  # over 2 T V bytes
        with_it, without = (report[way][k] for k in ("memory_over_2tv", "memory_without_weight_gradient_over_2tv"))
        assert with_it - without == pytest.approx(weight_gradient, abs=2e-3)
    assert report["materialised"]["memory_over_2tv"] > report["vocab_parallel"]["memory_over_2tv"]
    assert {"cpu", "load", "load_after"} <= set(report["machine"])
    assert report["floor"]["seconds"] == min(report["floor"]["whole_seconds"], report["floor"]["tiled_seconds"])


@pytest.mark.slow
def test_curves(tmp_path: Path) -> None:
    report = _run("--curves", str(tmp_path), "--json", str(tmp_path / "curves.json"))
    assert [row["tokens"] for row in report["over_tokens"]] == [12, 24, 48, 96, 192]
    assert [row["ranks"] for row in report["over_ranks"]] == [1, 2]
    assert {path.name for path in tmp_path.glob("*.png")} == {"head_tokens.png", "head_vocabulary.png"}

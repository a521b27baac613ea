"""tools/benchmark_head.py at sizes of seconds: every way is right, and the figures have their names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

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
    assert set(report["divergence"]["error"]) == {"logprobs", "entropy", "divergence", "d_hidden", "d_weight"}
    # A divergence is a difference of numbers of the size of the entropy.
    assert max(report["divergence"]["error"].values()) < max(tolerance, 2e-5)
    for way, key in (("fused", "floor"), ("divergence", "divergence_floor")):
        floor = report[key]["seconds"]
        assert floor == min(report[key]["whole_seconds"], report[key]["tiled_seconds"])
        assert report[way]["time_over_floor"] == pytest.approx(report[way]["seconds"] / floor, rel=0.05)
    assert set(report["absent"]) == {"liger_tp", "verl_triton"}
    assert report["machine"]["device"] == "cpu"


def test_a_missing_cuda_device_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the tool sets it when it is imported
    monkeypatch.syspath_prepend(str(TOOL.parent))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    import benchmark_head

    assert benchmark_head.main(["--device", "cuda"]) == 2
    assert "--device cpu" in capsys.readouterr().err


def test_adapters_of_other_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """With functions of their signatures: the sign, the arguments and the gradients are right."""
    monkeypatch.syspath_prepend(str(TOOL.parent))
    from head import rivals, ways

    def outputs(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logp = torch.log_softmax(hidden @ weight.t(), 1)
        return logp.gather(1, target[:, None])[:, 0], -(logp.exp() * logp).sum(1)

    class Liger:
        @staticmethod
        def apply(hidden: Tensor, weight: Tensor, target: Tensor, group: Any, **options: Any) -> tuple[Tensor, Tensor]:
            assert group.size() == 1 and options == {"return_entropy": True}
            logprobs, entropy = outputs(hidden, weight, target)
            return -logprobs, entropy

    def verl(hidden: Tensor, weight: Tensor, labels: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
        assert options == (1.0, "none", None)  # temperature, reduction, process group
        return outputs(hidden, weight, labels)

    packages = {
        "liger_kernel.ops": SimpleNamespace(LigerFusedLinearScaledCrossEntropyTPFunction=Liger),
        "verl.utils.kernel.linear_cross_entropy": SimpleNamespace(linear_cross_entropy=verl),
    }
    problem = ways.Problem.random(20, 30, 8, torch.device("cpu"), torch.float32)
    want = ways.dense(problem)
    try:
        for path, adapter in rivals.RIVALS.values():
            got = adapter(packages[path], problem)
            assert max(ways.errors(got, want, ways.Result._fields).values()) < 3e-6, path
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    for name, module in packages.items():
        monkeypatch.setitem(sys.modules, name, module)
    found, absent = rivals.find_rivals(torch.device("cuda"))
    assert set(found) == set(rivals.RIVALS) and not absent
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", None)
    found, absent = rivals.find_rivals(torch.device("cuda"))
    assert set(found) == {"verl_triton"} and "liger_kernel.ops" in absent["liger_tp"]


@pytest.mark.slow
def test_curves(tmp_path: Path) -> None:
    report = _run("--curves", str(tmp_path), "--json", str(tmp_path / "curves.json"))
    assert [row["tokens"] for row in report["over_tokens"]] == [12, 24, 48, 96, 192]
    assert [row["ranks"] for row in report["over_ranks"]] == [1, 2]
    assert {path.name for path in tmp_path.glob("*.png")} == {"head_tokens.png", "head_vocabulary.png"}

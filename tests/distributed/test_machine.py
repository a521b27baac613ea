"""What a machine offers, and what it is refused for, with CUDA's answers replaced."""

from __future__ import annotations

import importlib
import logging
import os
import re
import subprocess
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from asd_megatron.config import check_devices, make_recipe
from asd_megatron.distributed import device, launcher, machine
from asd_megatron.errors import UserError
from asd_megatron.models import te
from asd_megatron.models.compat import layers_text, resolve_layers

Import = Callable[[str], Any]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with two GPUs, where Transformer Engine can be imported."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    imports(monkeypatch, lambda name: None)
    return monkeypatch


def imports(monkeypatch: pytest.MonkeyPatch, transformer_engine: Import) -> None:
    original = importlib.import_module

    def import_module(name: str, package: str | None = None) -> Any:
        return transformer_engine(name) if name.startswith("transformer_engine") else original(name, package)

    monkeypatch.setattr(importlib, "import_module", import_module)


def recipe(**model: str) -> Any:
    return make_recipe({"model": {"path": "m", **model}, "data": {"train": "t"}})


# ---------------------------------------------------------------- layers


def test_auto_layers_by_dtype(cuda: pytest.MonkeyPatch) -> None:
    cuda.setattr(te, "version", lambda: (2, 11))
    assert resolve_layers("auto", torch.bfloat16) == resolve_layers("te", torch.bfloat16) == "te"
    assert resolve_layers("auto", torch.float32) == resolve_layers("local", torch.bfloat16) == "local"
    assert (
        "float32" in layers_text("auto", "local", torch.float32) and layers_text("auto", "te", torch.bfloat16) == "te"
    )
    with pytest.raises(UserError, match="model.layers te.*float32.*set model.layers auto or local"):
        resolve_layers("te", torch.float32)
    with pytest.raises(UserError, match="model.layers te.*float32.*set model.dtype bfloat16"):
        check_devices(recipe(layers="te", dtype="float32"))
    check_devices(recipe(layers="te"))


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError("libcudnn.so.9: cannot open shared object file\nmore"), "OSError: libcudnn.so.9: cannot open"),
        (ModuleNotFoundError("No module named 'einops'", name="einops"), "No module named 'einops'"),
        (ModuleNotFoundError("No module", name="transformer_engine"), r"not installed .*asd_megatron\[gpu\]"),
    ],
)
def test_a_transformer_engine_that_cannot_be_imported(cuda: pytest.MonkeyPatch, error: Exception, reason: str) -> None:
    def broken(name: str) -> None:
        raise error

    imports(cuda, broken)
    cuda.setattr(te, "version", lambda: (2, 11))
    assert resolve_layers("auto", torch.bfloat16) == "local"
    for refused in (lambda: check_devices(recipe(layers="te")), lambda: resolve_layers("te", torch.bfloat16)):
        with pytest.raises(UserError, match=reason):
            refused()
    text = layers_text("auto", "local", torch.bfloat16)
    assert text.startswith("local") and "\n" not in text


@pytest.mark.parametrize("broken", ["__init__", "pytorch"])
def test_megatron_does_without_a_broken_transformer_engine(tmp_path: Path, broken: str) -> None:
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / f"{broken}.py").write_text("raise OSError('libcublas.so.13: cannot open shared object file')")
    program = (
        "from asd_megatron.distributed import device, machine; device.prepare()\n"
        "import megatron.core.models.gpt.gpt_layer_specs as specs; assert not specs.HAVE_TE\n"
        "print(machine.transformer_engine_problem())"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ("importing it failed (OSError: libcublas.so.13: cannot open shared object file)")


@pytest.mark.parametrize(
    ("release", "megatron", "problem", "untested"),
    [
        ("2.8.0", "0.16.1", r"2\.8 is older than the 2\.9 that megatron-core 0\.16 needs", None),
        ("2.9.0", "0.16.1", None, None),
        ("2.11.0+c188b533", "0.16.1", None, None),
        ("2.14.0", "0.16.1", None, r"newer than those tested with megatron-core 0\.16 \(2\.9 to 2\.11\)"),
        ("2.10.0", "0.19.2", r"2\.10 is older than the 2\.11", None),
        ("2.18.0", "0.19.2", None, None),
        ("2.18.0", "0.18.0", None, r"no release .* was tested with megatron-core 0\.18"),
    ],
)
def test_releases_of_transformer_engine(
    cuda: pytest.MonkeyPatch, release: str, megatron: str, problem: str | None, untested: str | None
) -> None:
    package = types.SimpleNamespace(__version__=release)
    imports(cuda, lambda name: package)
    cuda.setattr(te.metadata, "version", lambda name: megatron)
    found = te.problem(torch.bfloat16)
    assert (found is None) == (problem is None) and re.search(problem or "", found or "")
    if found is None:
        note = te.untested()
        assert (note is None) == (untested is None) and re.search(untested or "", note or "")


def test_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_layers("auto", torch.bfloat16) == resolve_layers("auto", torch.float32) == "local"
    with pytest.raises(UserError, match="model.layers te.*CUDA device.*auto or local"):
        check_devices(recipe(layers="te"))


# ---------------------------------------------------------------- versions and environment


@pytest.mark.parametrize(
    ("version", "old"),
    [
        ("2.7.1+cu126", True),
        ("2.8.0", False),
        ("2.8.0a0+34c6371d24.nv25.08", False),
        ("2.13.0+cpu", False),
        ("x", False),
    ],
)
def test_torch_below_2_8_is_refused_on_cuda_only(cuda: pytest.MonkeyPatch, version: str, old: bool) -> None:
    cuda.setattr(torch, "__version__", version)
    check_devices(recipe(), cuda=False)
    if old:
        with pytest.raises(UserError, match=r"torch 2\.7\.1.*install torch 2\.8 or newer"):
            check_devices(recipe())
    else:
        check_devices(recipe())


def test_a_gpu_without_bfloat16(cuda: pytest.MonkeyPatch) -> None:
    cuda.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    with pytest.raises(UserError, match="bfloat16.*set model.dtype float32"):
        check_devices(recipe())
    check_devices(recipe(dtype="float32"))


def test_attention_switches_of_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron-Core asserts that they are unset or 1, whatever the layers."""
    monkeypatch.delenv(machine.ATTENTION_CHOSEN, raising=False)  # of models that other tests built
    monkeypatch.setenv("NVTE_FUSED_ATTN", "1")
    check_devices(recipe(), cuda=False)
    monkeypatch.setenv("NVTE_FUSED_ATTN", "0")
    with pytest.raises(UserError, match="NVTE_FUSED_ATTN is 0.*unset it"):
        check_devices(recipe(), cuda=False)


def test_float32_stays_float32(cuda: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """NGC containers turn TF32 on; the variable is gone before the first use of the GPU, and rank 0 says so."""
    calls: list[Any] = []
    cuda.setattr(torch, "set_float32_matmul_precision", calls.append)
    for rank, said in (("1", 0), ("0", 1)):
        environment = {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1", "LOCAL_RANK": rank, "RANK": rank}
        cuda.setattr(torch.cuda, "set_device", lambda index, seen=environment: calls.append((index, len(seen))))
        with caplog.at_level(logging.WARNING):
            device._prepare_cuda(environment)
        assert calls == ["highest", (int(rank), 2)]
        assert caplog.text.count("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE is ignored") == said
        calls.clear()


@pytest.mark.parametrize(
    ("environment", "gpus", "expected"),
    [
        ({}, 2, 0),
        ({"LOCAL_RANK": "1", "SLURM_LOCALID": "0", "WORLD_SIZE": "4"}, 2, 1),
        ({"SLURM_LOCALID": "1", "WORLD_SIZE": "4"}, 2, 1),
        ({"SLURM_LOCALID": "3", "WORLD_SIZE": "4"}, 1, 0),  # srun --gpus-per-task=1
        ({"WORLD_SIZE": "4", "RANK": "1"}, 2, "set LOCAL_RANK"),
        ({"LOCAL_RANK": "2", "WORLD_SIZE": "4"}, 2, "at most 2 ranks"),
    ],
)
def test_the_gpu_of_a_rank(
    cuda: pytest.MonkeyPatch, environment: dict[str, str], gpus: int, expected: int | str
) -> None:
    cuda.setattr(torch.cuda, "device_count", lambda: gpus)
    if isinstance(expected, int):
        assert machine.gpu_of_rank(environment) == expected
    else:
        with pytest.raises(UserError, match=expected):
            machine.gpu_of_rank(environment)


# ---------------------------------------------------------------- the launcher's death


def test_a_process_whose_launcher_died_before_it_looked(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends; one that inherited the variable from a living launcher of something else is not watched."""
    ended = threading.Event()
    monkeypatch.setattr(os, "_exit", lambda status: ended.set())
    launcher.end_with_launcher({launcher.LAUNCHER: str(os.getpid())})
    launcher.end_with_launcher({})
    assert not [thread for thread in threading.enumerate() if thread.name == "launcher watch"]
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    launcher.end_with_launcher({launcher.LAUNCHER: str(gone.pid)})
    assert ended.wait(30)

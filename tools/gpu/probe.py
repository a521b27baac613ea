"""Prints this machine as one line of JSON, the arguments of `machine.Machine`. Creates a CUDA context, so it runs in a
process of its own."""

from __future__ import annotations

import importlib
import json
import platform
import subprocess
import sys
from dataclasses import asdict
from importlib import metadata
from typing import Any

import torch
from machine import Machine, python_of_servers

from asd_megatron.distributed.machine import torch_problem
from asd_megatron.models import te
from asd_megatron.models.precision import MEGATRON_RECIPES, Precision

NO_CUDA = "no CUDA device is visible"
FP8_CAPABILITY = (8, 9)
TEST_PACKAGES = ("pytest", "pytest_timeout", "hypothesis", "transformers")
SERVER = "import torch, importlib.metadata as m; print(m.version('sglang'), torch.__version__, torch.version.cuda)"
GIB = 2**30


def main() -> None:
    problems: dict[str, str] = {}
    versions = {"Python": platform.python_version(), "torch": str(torch.__version__)}
    versions["megatron-core"] = metadata.version("megatron-core")
    there: dict[str, Any] = {}
    if torch.cuda.is_available():
        there = _gpus()
        _note(problems, "cuda", torch_problem())
    else:
        problems["cuda"] = NO_CUDA if torch.version.cuda else f"{NO_CUDA}: torch {torch.__version__} has no CUDA"
    versions |= {"CUDA": str(torch.version.cuda)} if torch.version.cuda else {}
    _note(problems, "transformer_engine", te.problem(torch.bfloat16))
    if "transformer_engine" not in problems:
        versions["Transformer Engine"] = ".".join(map(str, te.version()))
    _fp8(problems)
    _note(problems, "apex", None if te.apex_fuses_weight_gradients() else "its fused kernels cannot be imported")
    _note(problems, "nvml", _nvml_problem())
    _note(problems, "pytest", _tests_problem())
    _note(problems, "sglang", _servers(versions))
    print(json.dumps(asdict(Machine(**there, versions=versions, problems=problems))))


def _note(problems: dict[str, str], name: str, problem: str | None) -> None:
    if problem is not None:
        problems[name] = problem


def _gpus() -> dict[str, Any]:
    first = torch.cuda.get_device_properties(0)
    return {
        "gpus": torch.cuda.device_count(),
        "name": first.name,
        "memory_gib": first.total_memory / GIB,
        "capability": f"{first.major}.{first.minor}",
    }


def _fp8(problems: dict[str, str]) -> None:
    """Transformer Engine's recipes by `Precision`'s rules; the servers' by their own kernels'."""
    machine = te.machine() if "transformer_engine" not in problems else None
    for recipe in MEGATRON_RECIPES:
        if machine is None:
            problems[f"fp8_{recipe}"] = problems.get("transformer_engine", NO_CUDA)
        else:
            _note(problems, f"fp8_{recipe}", Precision(recipe).machine_problem(machine))  # type: ignore[arg-type]
    if not torch.cuda.is_available():
        problems["fp8_servers"] = NO_CUDA
    elif torch.cuda.get_device_capability() < FP8_CAPABILITY:
        problems["fp8_servers"] = "this GPU has no FP8 arithmetic"


def _nvml_problem() -> str | None:
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        nvml.nvmlShutdown()
    except Exception as error:  # the package or the driver's library is missing, or the driver does not answer
        return f"{type(error).__name__}: {error}"
    return None


def _tests_problem() -> str | None:
    for name in TEST_PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            return f"importing {name} failed ({error}): install the extra `asd_megatron[dev]`"
    return None


def _servers(versions: dict[str, str]) -> str | None:
    """Why no SGLang server can be started on a GPU; None, and its version, if one can."""
    python = python_of_servers()
    if python is None:
        return "there is none: `tools/sglang_env/create.sh gpu .venv-sglang-gpu`, or set ASD_MEGATRON_SGLANG_PYTHON"
    try:
        done = subprocess.run([str(python), "-c", SERVER], capture_output=True, text=True, timeout=120, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{python} does not answer: {error}"
    sglang, release, cuda = done.stdout.split()[-3:]
    if cuda == "None":
        return f"{python} has torch {release} without CUDA"
    versions["SGLang"] = f"{sglang} with torch {release}"
    return None


if __name__ == "__main__":
    sys.exit(main())

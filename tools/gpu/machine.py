"""What rows need of a machine, and what this one has. Nothing here creates a CUDA context: `probe` asks a process that
ends before the first row begins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PROBE_SECONDS = 300.0
SERVERS_PYTHON = "ASD_MEGATRON_SGLANG_PYTHON"
LABELS = {
    "cuda": "CUDA",
    "pytest": "pytest with its plugins",
    "transformer_engine": "Transformer Engine",
    "fp8_current": "FP8 (current scaling)",
    "fp8_blockwise": "FP8 (blockwise)",
    "fp8_mxfp8": "MXFP8",
    "apex": "Apex",
    "nvml": "NVML",
    "sglang": "SGLang's environment",
    "fp8_servers": "FP8 in SGLang",
}
"""What a row may need besides GPUs, as the table names it."""


@dataclass(frozen=True)
class Needs:
    """gpus: how many. memory_gib: of each. others: keys of LABELS."""

    gpus: int = 1
    memory_gib: float = 0.0
    others: tuple[str, ...] = ()

    def __str__(self) -> str:
        memory = f" of {self.memory_gib:g} GiB" if self.memory_gib else ""
        gpus = f"{self.gpus} GPU{'s' if self.gpus > 1 else ''}{memory}"
        return ", ".join([gpus, *(LABELS[name] for name in self.others if name not in ("cuda", "pytest"))])


@dataclass(frozen=True)
class Machine:
    """This machine as its rows see it.

    Attributes:
        gpus, name, memory_gib, capability: of the GPUs that are visible; the last three of the first.
        versions: of Python, torch, CUDA, Transformer Engine and others that are there.
        problems: by key of LABELS, why it is not there.
    """

    gpus: int = 0
    name: str = ""
    memory_gib: float = 0.0
    capability: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    problems: Mapping[str, str] = field(default_factory=dict)

    def missing(self, needs: Needs) -> str | None:
        """The first thing that is missing, with the reason; None if nothing is."""
        if "cuda" in self.problems:
            return self.problems["cuda"]
        if self.gpus < needs.gpus:
            return f"{needs.gpus} GPUs are needed and {self.gpus} visible"
        if self.memory_gib < needs.memory_gib:
            return f"{needs.memory_gib:g} GiB are needed and the GPU has {self.memory_gib:.0f}"
        found = (f"{LABELS[name]}: {self.problems[name]}" for name in needs.others if name in self.problems)
        return next(found, None)

    def text(self) -> str:
        gpus = f"{self.gpus} x {self.name} ({self.memory_gib:.0f} GiB, {self.capability})" if self.gpus else "no GPU"
        return ", ".join([gpus, *(f"{name} {version}" for name, version in self.versions.items())])


def python_of_servers() -> Path | None:
    """The interpreter of SGLang servers: what the environment names, else that of `make gpu-checks`; None if there is
    neither."""
    if SERVERS_PYTHON in os.environ:
        return Path(os.environ[SERVERS_PYTHON])
    found = ROOT / ".venv-sglang-gpu" / "bin" / "python"
    return found if found.exists() else None


def environment() -> dict[str, str]:
    """The environment of every row's process: the checkout is importable, output is unbuffered."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    servers = python_of_servers()
    named = {} if servers is None else {SERVERS_PYTHON: str(servers)}
    return {**os.environ, **named, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "NO_COLOR": "1"}


def probe(python: str = sys.executable, seconds: float = PROBE_SECONDS) -> Machine:
    """This machine. A probe that fails is a machine without CUDA, whose problem is the end of its output."""
    command = [python, str(Path(__file__).with_name("probe.py"))]
    try:
        done = subprocess.run(
            command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False
        )
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return Machine(**found)
    except subprocess.TimeoutExpired:
        return Machine(problems={"cuda": f"the machine could not be probed within {seconds:.0f} s"})
    except (IndexError, ValueError, TypeError):
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return Machine(problems={"cuda": f"the machine could not be probed: {last}"})


def as_json(machine: Machine) -> dict[str, Any]:
    return asdict(machine)

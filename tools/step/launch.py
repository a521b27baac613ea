"""Measurements run in processes of their own, on as many local ranks as they need; their results come back as JSON."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import asd_megatron
from asd_megatron.distributed.launch import torchrun_command, worker_environment
from asd_megatron.errors import UserError

TOOLS = Path(__file__).resolve().parents[1]
TAIL = 2000  # characters of a failed process's output that are shown


def run_cell(kind: str, spec: Mapping[str, Any], *, ranks: int = 1, threads: int = 1, timeout: float) -> dict[str, Any]:
    """What `step.cell` measures for `spec` (`step/cell.py`). Raises UserError with its output when it fails or does
    not end within `timeout` seconds."""
    with tempfile.TemporaryDirectory(prefix="step-") as folder:
        out = Path(folder) / "result.json"
        arguments = [kind, json.dumps({**spec, "folder": folder}), str(out)]
        command = [sys.executable, "-m", "step.cell", *arguments]
        if ranks > 1:
            command = torchrun_command(ranks, "step.cell", arguments)
        run(command, threads=threads, timeout=timeout)
        return dict(json.loads(out.read_text()))


def run(command: Sequence[str], *, threads: int, timeout: float, environment: Mapping[str, str] | None = None) -> None:
    """Run to the end, output kept for the error message. `environment` adds to this process's."""
    paths = [str(TOOLS), str(Path(asd_megatron.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    env = {**worker_environment(1), "OMP_NUM_THREADS": str(threads)}
    env["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    env |= environment or {}
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=env, start_new_session=True)
        try:
            status: int | None = process.wait(timeout)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # its own session: the ranks too, nobody else
                process.wait()
        if status != 0:
            output.seek(0)
            tail = output.read().decode(errors="replace")[-TAIL:]
            reason = f"did not end in {timeout:.0f} s" if status is None else f"ended with status {status}"
            reason += " (killed: is there too little memory?)" if status == -signal.SIGKILL else ""
            raise UserError(f"{' '.join(command[:4])} ... {reason}:\n{tail}")

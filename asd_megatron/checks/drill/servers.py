"""Faults of SGLang servers, where SGLang is installed (ASD_MEGATRON_SGLANG_PYTHON)."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

from asd_megatron.checks.drill.disturbance import FAULT_STEP, Disturbance, Verdict, disturb_once
from asd_megatron.checks.drill.fault import Fault, NotPossible
from asd_megatron.checks.drill.program import Program
from asd_megatron.checks.drill.world import STEPS, World
from asd_megatron.observe.writer import read_metrics

PYTHON_VARIABLE = "ASD_MEGATRON_SGLANG_PYTHON"
ROLLOUTS = 8  # of a step
SERVERS = 2


def faults() -> dict[str, Fault]:
    return {
        "server_killed": Fault(
            "SIGKILL of an SGLang server that holds carried responses, in rollout",
            "the run continues, every group complete, no carried response lost",
            _server_killed,
        )
    }


def _sections(python: str) -> dict[str, dict[str, Any]]:
    args = {"max-running-requests": 32, "max-total-tokens": 8192}
    return {
        "parallelism": {"tensor": 1},
        "algorithm": {"name": "no_gate", "importance_correction": "truncated"},
        "sampling": {"problems_per_step": 2, "rollouts_per_problem": 4, "max_response_tokens": 64},
        "rollout": {
            "engine": "sglang",
            "servers": SERVERS,
            "server_python": python,
            "server_args": args,
            "oversampling": 1.5,
            "partial_rollouts": True,
            "max_staleness": 3,
        },
    }


def _server_killed(world: World, name: str) -> Verdict:
    python = os.environ.get(PYTHON_VARIABLE)
    if not python:
        raise NotPossible(f"{PYTHON_VARIABLE} names no Python with SGLang")
    killed: list[int] = []

    def kill(program: Program) -> None:
        killed.extend(servers_of(program.process.pid)[:1])
        for process in killed:
            os.kill(process, signal.SIGKILL)

    disturbance = Disturbance("rollout", rank=None, sections=_sections(python))
    ended = disturb_once(world, name, disturbance, kill)
    rows = read_metrics(world.run_folder(name))
    carried = sum(row["rollouts/carried_groups"] for row in rows)
    noticed = min(row["servers/serving"] for row in rows) == SERVERS - 1
    whole = [row["step"] for row in rows] == list(range(1, STEPS + 1))
    whole = whole and all(row["rollouts/total"] == ROLLOUTS for row in rows)
    dropped = sum(row["rollouts/dropped_groups"] for row in rows)
    passed = ended.status == 0 and bool(killed) and whole and noticed and carried > 0 and not dropped
    happened = (
        f"status {ended.status}; server out of use from step {FAULT_STEP}; {carried:.0f} carried groups trained on,"
    )
    return Verdict(passed, f"{happened} {dropped:.0f} dropped, every step of {ROLLOUTS} rollouts", None)


def servers_of(process: int) -> list[int]:
    """The processes of SGLang's HTTP servers among the descendants of `process`, oldest first."""
    parents, servers = dict[int, int](), []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            number = int(path.name)
            parents[number] = int((path / "stat").read_bytes().rpartition(b")")[2].split()[1])
            if b"sglang.launch_server" in (path / "cmdline").read_bytes():
                servers.append(number)

    def descends(number: int) -> bool:
        while number in parents and number != process:
            number = parents[number]
        return number == process

    return sorted(number for number in servers if descends(number))

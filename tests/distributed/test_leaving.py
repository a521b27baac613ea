"""A rank that fails ends at once, though others wait for it in a collective; its error comes first and is the only
traceback."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from asd_megatron.distributed import layout as layouts
from asd_megatron.distributed.layout import Layout
from tests.distributed.harness import run_ranks

PROGRAM = """
import os, sys, time
from contextlib import ExitStack
import torch, torch.distributed as dist
from asd_megatron.cli.guard import as_rank, leave
from asd_megatron.distributed import layout as layouts
from asd_megatron.distributed.layout import Layout

def program():
    with ExitStack() as closing:
        closing.push(layouts.leave)
        layouts.init(Layout(data=2))
        dist.barrier()
        if os.environ["RANK"] == "1":
            print(time.time(), flush=True)
            raise ValueError("boom on rank one")
        dist.all_reduce(torch.ones(1))
        dist.all_reduce(torch.ones(1))
    return 0

leave(as_rank(program))
"""


def test_both_ranks_end_and_the_cause_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "failing_rank.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", f"{Path(layouts.__file__).parents[2]}:{tmp_path}")
    code = "import sys; from asd_megatron.cli.launch import run_ranks; sys.exit(run_ranks('failing_rank', [], 2))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done.stderr
    assert time.time() - float(done.stdout) < 30  # torch ends ranks that wait for others after 30 s
    errors = done.stderr[done.stderr.index("rank 1 failed:") :]
    assert errors.count("Traceback (most recent call last)") == 1
    traceback, _, others = errors.partition("ValueError: boom on rank one\n")
    assert traceback and "ended too" not in traceback
    assert all(line.startswith("rank 0 ended too: ") for line in others.splitlines())


def _leave_after(rank: int) -> list[bool]:
    """Whether the ranks are still joined after an error, and after none."""
    import torch.distributed as dist

    found = []
    for error in (ValueError, None):
        layouts.init(Layout(data=dist.get_world_size() if dist.is_initialized() else 2))
        layouts.leave(error)
        found.append(dist.is_initialized())
    return found


def test_groups_are_destroyed_only_without_an_error() -> None:
    assert run_ranks(_leave_after, 2, init=False) == [[True, False]] * 2

"""The stand-in for Transformer Engine, and how tests run with it: in new processes, because Megatron-Core looks for
Transformer Engine once, when it is imported."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.distributed.harness import run_ranks

STAND_IN = Path(__file__).parent / "transformer_engine"


@contextmanager
def stand_in() -> Iterator[None]:
    """Inside, new processes find the stand-in as `transformer_engine`."""
    folder, before = str(STAND_IN.parent), os.environ.get("PYTHONPATH")
    sys.path.insert(0, folder)  # what ranks of the harness inherit
    os.environ["PYTHONPATH"] = os.pathsep.join([folder, *([before] if before else [])])
    try:
        yield
    finally:
        sys.path.remove(folder)
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def run_ranks_with_te(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 200) -> list[Any]:
    """`harness.run_ranks` with the stand-in."""
    with stand_in():
        return run_ranks(fn, world_size, *args, timeout=timeout, fresh=True)

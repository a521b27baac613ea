"""The stand-in for Transformer Engine, and how tests run with it: in new processes, because Megatron-Core looks for
Transformer Engine once, when it is imported."""

from __future__ import annotations

import functools
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import PRELOADED, run_ranks, start_server

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


def run_ranks_with_te(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 200, init: bool = True
) -> list[Any]:
    """`harness.run_ranks` with the stand-in, forked from a server that has imported it and Megatron-Core."""
    context = multiprocessing.get_context("forkserver")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forkserver, "connect_to_new_process", _server().connect_to_new_process)
        return run_ranks(fn, world_size, *args, timeout=timeout, init=init, context=context)


@functools.cache
def _server() -> forkserver.ForkServer:
    server = forkserver.ForkServer()
    server.set_forkserver_preload(PRELOADED)
    with stand_in():
        start_server(server.ensure_running)
    return server

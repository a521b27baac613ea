"""Traces of PyTorch's profiler, and histories of the memory on a GPU, of single steps."""

from __future__ import annotations

import gzip
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from asd_megatron.files import PARTIAL, atomic_file

log = logging.getLogger("asd_megatron")

HISTORY_ENTRIES = 100_000
"""Allocations and frees that a history keeps, the newest ones; each takes some kilobytes of the file."""


def trace_path(folder: Path, step: int, rank: int) -> Path:
    return folder / f"step_{step:06d}_rank_{rank}.json.gz"


def history_path(folder: Path, step: int, rank: int) -> Path:
    """For https://pytorch.org/memory_viz. A pickle: this program writes it and never reads one."""
    return folder / f"step_{step:06d}_rank_{rank}_memory.pickle"


@contextmanager
def recorded() -> Iterator[Callable[[Path, int, int], None]]:
    """Record what runs inside on this rank. Yields the function that writes it, to be called afterwards with (folder,
    step, rank); without that call nothing is written."""
    from torch.profiler import ProfilerActivity, profile

    cuda = torch.cuda.is_available()
    profiler = profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda)
    history: list[Any] = []

    def write(folder: Path, step: int, rank: int) -> None:
        _write_trace(profiler, trace_path(folder, step, rank))
        for dump in history:
            with atomic_file(history_path(folder, step, rank)) as partial:
                dump(partial)

    with _memory_history(history) if cuda else nullcontext(), profiler:
        yield write


def _write_trace(profiler: Any, path: Path) -> None:
    with (
        atomic_file(path) as partial,
        tempfile.TemporaryDirectory(prefix=".trace.", suffix=PARTIAL, dir=path.parent) as folder,
    ):
        plain = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(plain))
        with plain.open("rb") as source, gzip.open(partial, "wb", compresslevel=4) as packed:
            shutil.copyfileobj(source, packed)


@contextmanager
def _memory_history(history: list[Any]) -> Iterator[None]:
    """Record allocations inside; afterwards `history` has the function that writes them to a path."""
    memory: Any = torch.cuda.memory
    try:
        memory._record_memory_history(stacks="python", max_entries=HISTORY_ENTRIES)
    except Exception as error:  # no public interface: another release of torch may have another one
        log.warning("profiler: no history of the memory (%s)", error)
        yield
        return
    try:
        yield
        snapshot = memory._snapshot()
        history.append(lambda path: _pickle(snapshot, path))
    finally:
        memory._record_memory_history(enabled=None)


def _pickle(snapshot: Any, path: Path) -> None:
    import pickle

    with path.open("wb") as file:
        pickle.dump(snapshot, file)

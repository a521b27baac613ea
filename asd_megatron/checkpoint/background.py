"""Writing checkpoints while training goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from asd_megatron.checkpoint.parts import Part
from asd_megatron.distributed.layout import ProcessGroups
from asd_megatron.distributed.objects import on_rank_zero

ALIGNMENT = 64  # bytes
TIMEOUT = timedelta(hours=2)
"""How much longer than the fastest rank the slowest one may write."""


class Background:
    """A thread of each rank that writes one checkpoint at a time.

    The ranks' threads meet on a gloo group of their own, so they disturb no collective of training, and a checkpoint is
    complete, and named by `latest`, as soon as the slowest of them has written its part. A process that is killed
    meanwhile leaves the previous checkpoint as it was.

    Host memory: this rank's part of a checkpoint, kept from one to the next; pinned on CUDA.
    """

    def __init__(self, process_groups: ProcessGroups) -> None:
        """Collective over all ranks."""
        self._host = process_groups.host
        self._group = dist.new_group(backend="gloo", timeout=TIMEOUT)
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    @property
    def busy(self) -> bool:
        """Whether a checkpoint was begun and its outcome is not known yet; the same on every rank."""
        return self._thread is not None

    def start(self, write: Callable[[Iterable[Part], dist.ProcessGroup], None], parts: Iterable[Part]) -> None:
        """Copy the parts to host memory and begin to `write` them. Not while `busy`."""
        held = list(self._hold(list(parts)))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._thread = threading.Thread(target=self._run, args=(partial(write, held, self._group),), daemon=True)
        self._thread.start()

    def settle(self, *, wait: bool) -> bool:
        """Whether nothing is in flight any more; `wait` until then. Raises the error of a checkpoint that failed, on
        every rank, a UserError where the operating system refused. Collective over all ranks."""
        thread = self._thread
        if thread is None:
            return True
        # Global rank 0's thread ends after it has told the others'.
        if not (wait or on_rank_zero(lambda: not thread.is_alive(), self._host)):
            return False
        thread.join()
        self._thread, error, self._error = None, self._error, None
        if error is not None:
            raise error
        return True

    def close(self) -> None:
        """Wait for the checkpoint in flight, whose error is dropped, and leave the group."""
        if self._thread is not None:
            self._thread.join()
        dist.destroy_process_group(self._group)

    def _run(self, write: Callable[[], None]) -> None:
        try:
            write()
        except Exception as error:
            self._error = error

    def _hold(self, parts: list[Part]) -> Iterator[Part]:
        """The parts with copies of their numbers in host memory."""
        needed = sum(_aligned(part.bytes) for part in parts)
        if self._memory.numel() < needed:
            self._memory = _host_memory(needed)
        start = 0
        for part in parts:
            held = self._memory[start : start + part.bytes].view(part.dtype)
            held.copy_(part.values(), non_blocking=True)
            start += _aligned(part.bytes)
            yield replace(part, values=partial(_same, held))


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _host_memory(size: int) -> Tensor:
    """`size` bytes, pinned where there is CUDA: registered, because PyTorch's own pinned memory takes powers of two."""
    memory = torch.empty(size, dtype=torch.uint8)
    if torch.cuda.is_available():
        torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), size, 0)  # if refused, copies are slower
    return memory

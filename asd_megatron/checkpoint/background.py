"""Writing checkpoints while training goes on."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from asd_megatron.checkpoint.parts import Part
from asd_megatron.distributed.layout import ProcessGroups
from asd_megatron.distributed.objects import first_message, on_rank_zero

log = logging.getLogger(__name__)

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
        self.step = 0
        """Of the checkpoint in flight: begun, with an outcome that `settle` has not told yet. 0: none."""

    def start(self, step: int, write: Callable[[Iterable[Part], dist.ProcessGroup], None], parts: list[Part]) -> bool:
        """Copy the parts to host memory and begin to `write` them. Nothing may be in flight.

        False, on every rank and with a warning, if one of them cannot: `write` is then not called, and the memory of
        all is free again. Collective over all ranks.
        """
        held: list[Part] = []
        failure: str | None = None
        try:
            held += self._hold(parts)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            size = sum(part.bytes for part in parts) / 1e9
            failure = f"rank {self._host.rank()} cannot copy its {size:.1f} GB to host memory ({reason:.300})"
        failure = first_message(failure, self._host)
        if failure is not None:
            if self._host.rank() == 0:
                log.warning(
                    "the checkpoint of step %d is written while training waits, because %s: free host memory,"
                    " or set checkpoint.async_save to false",
                    step,
                    failure,
                )
            self._free()
            return False
        self.step = step
        self._thread = threading.Thread(target=self._run, args=(partial(write, held, self._group),), daemon=True)
        self._thread.start()
        return True

    def settle(self, *, wait: bool = True) -> int:
        """The step of the checkpoint in flight if it is complete, the same on every rank; 0 if it is not, or nothing
        was in flight. `wait`: until it is. Raises the error of one that failed, on every rank, a UserError where the
        operating system refused. Collective over all ranks."""
        thread = self._thread
        # Global rank 0's thread ends after it has told the others'.
        if thread is None or not (wait or on_rank_zero(lambda: not thread.is_alive(), self._host)):
            return 0
        thread.join()
        step, error = self.step, self._error
        self._thread, self._error, self.step = None, None, 0
        if error is not None:
            raise error
        return step

    def close(self) -> None:
        """Wait for the checkpoint in flight, whose error is logged, and leave the group."""
        if self._thread is not None:
            self._thread.join()
            if self._error is not None:
                log.warning("the checkpoint of step %d is not complete: %s", self.step, self._error)
        dist.destroy_process_group(self._group)
        self._free()

    def _run(self, write: Callable[[], None]) -> None:
        try:
            write()
        except Exception as error:
            self._error = error

    def _hold(self, parts: list[Part]) -> Iterator[Part]:
        """The parts with copies of their numbers in host memory."""
        needed = sum(_aligned(part.bytes) for part in parts)
        if self._memory.numel() < needed:
            self._free()
            self._memory = _host_memory(needed)
        start = 0
        for part in parts:
            held = self._memory[start : start + part.bytes].view(part.dtype)
            held.copy_(part.values(), non_blocking=True)
            start += _aligned(part.bytes)
            yield replace(part, values=partial(_same, held))

    def _free(self) -> None:
        if self._memory.is_pinned():
            with suppress(RuntimeError):  # after an error copies to it may still be under way
                torch.cuda.synchronize()
            # Addresses that stay registered cannot be registered again.
            torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr())
        self._memory = torch.empty(0, dtype=torch.uint8)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _host_memory(size: int) -> Tensor:
    """`size` bytes, pinned where there is CUDA: registered, because PyTorch's own pinned memory takes powers of two."""
    memory = torch.empty(size, dtype=torch.uint8)
    if torch.cuda.is_available():
        cudart = torch.cuda.cudart()
        if cudart.cudaHostRegister(memory.data_ptr(), size, 0) != cudart.cudaError.success:
            log.warning("host memory for checkpoints cannot be page-locked: copies to it are slower")
            with suppress(RuntimeError):  # CUDA reports the refusal once more, as the error of the next kernel
                torch.ones((), device="cuda").neg()
    return memory

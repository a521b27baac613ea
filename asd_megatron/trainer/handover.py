"""Offloading: the contents of tensors in page-locked host memory, their device memory free for another process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

BLOCK_BYTES = 1 << 28
"""Of host memory at a time. A power of two, because PyTorch rounds page-locked memory up to one: 11 GiB in one piece
would take 16."""


class HostMemory:
    """The contents of offloaded tensors.

    Whole storages move, so that tensors and their views stay the same objects; between `offload` and `reload` they have
    no memory, and reading them is an error. The host memory is taken at the first `offload` and kept: page-locking
    takes longer than the copies.
    """

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []  # [BLOCK_BYTES] uint8 each
        self._offloaded: list[tuple[torch.UntypedStorage, int]] = []  # with its bytes

    def offload(self, tensors: Iterable[Tensor]) -> None:
        """Copy the storages of `tensors` to the host and free them on their device. The copies are complete then."""
        assert not self._offloaded, "offloaded already"
        storages = {storage.data_ptr(): storage for storage in (tensor.untyped_storage() for tensor in tensors)}
        self._offloaded = [(storage, storage.nbytes()) for storage in storages.values() if storage.nbytes()]
        for on_host, on_device in self._pieces():
            on_host.copy_(on_device, non_blocking=True)
        torch.cuda.synchronize()
        for storage, _ in self._offloaded:
            storage.resize_(0)

    def reload(self) -> None:
        """Take the memory again and copy the contents back, in the order of the current stream. Nothing when nothing is
        offloaded."""
        for storage, size in self._offloaded:
            storage.resize_(size)
        for on_host, on_device in self._pieces():
            on_device.copy_(on_host, non_blocking=True)
        self._offloaded = []

    def _pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The storages' bytes (uint8), on the host and on the device, one after another over the blocks:

        storages   | a a a a a | b b | c c c c |
        blocks     | a a a a | a b b c | c c c   |        pieces: a[:4], a[4:], b, c[:1], c[1:]
        """
        position = 0
        for storage, size in self._offloaded:
            content = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # type: ignore[call-overload]
            done = 0
            while done < size:
                number, start = divmod(position + done, BLOCK_BYTES)
                if number == len(self._blocks):
                    pinned = torch.cuda.is_available()
                    self._blocks.append(torch.empty(BLOCK_BYTES, dtype=torch.uint8, pin_memory=pinned))
                length = min(size - done, BLOCK_BYTES - start)
                yield self._blocks[number][start : start + length], content[done : done + length]
                done += length
            position += size

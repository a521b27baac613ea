"""Weight updates that carry only the elements that have changed since the last one.

At a learning rate of 1e-6 an update changes less than one element in a hundred of a bfloat16 model, because a bfloat16
number moves by steps of 1/256 of itself. The trainer keeps the weights as they were last sent in host memory, compares
bit by bit, and sends of each tensor positions and new values (`plugin/asd_weight_delta.py` has the format, and applies
it in the server). Nothing is added up, so base and deltas are exactly the trainer's weights, and checksums are compared
after a delta as after a complete update.

A delta only goes to servers that reported the label of its base before they were paused. Every other case is a complete
update for all servers of that transmission: the first one, a server that was restarted or failed, every n-th update.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from asd_megatron.rollout.sglang.servers.plugin.asd_weight_delta import CHUNK, UNKNOWN, Changes, integers
from asd_megatron.rollout.sglang.weight_sync.protocol import NamedTensors, Receiver, Transport

log = logging.getLogger(__name__)

PIECE = 256 * CHUNK  # elements compared at a time: 32 MiB in bfloat16
BLOCK_BYTES = 256 * 2**20  # of host memory taken at a time; torch rounds pinned memory up to a power of two


class SentWeights:
    """The weights as they were last sent: a copy in host memory, pinned for tensors on CUDA.

    It takes the bytes of the model as it is sent, and up to an eighth more if they are pinned. Tensors are compared
    where they are; a piece of the copy is brought there at a time.
    """

    def __init__(self) -> None:
        self._pieces: dict[str, list[Tensor]] = {}  # name -> flat, as integers
        self._free = torch.empty(0, dtype=torch.uint8)

    def keep(self, name: str, tensor: Tensor) -> None:
        """Copy all of `tensor`."""
        flat = integers(tensor.detach().reshape(-1)).split(PIECE)
        if [len(piece) for piece in self._pieces.get(name, ())] != [len(piece) for piece in flat]:
            self._pieces[name] = [self._allocate(piece) for piece in flat]
        for kept, piece in zip(self._pieces[name], flat, strict=True):
            kept.copy_(piece, non_blocking=True)

    def changes(self, name: str, tensor: Tensor) -> Changes:
        """The elements of `tensor` with other bits than its copy, which takes them. Raises KeyError for a tensor that
        was not kept."""
        found, start = [], 0
        for kept, piece in zip(self._pieces[name], integers(tensor.detach().reshape(-1)).split(PIECE), strict=True):
            at = _differing(piece, kept)
            if at.numel():
                kept.copy_(piece, non_blocking=True)
                found.append(at + start)
            start += len(piece)
        none = torch.empty(0, dtype=torch.int64, device=tensor.device)
        return Changes.of(name, tensor, torch.cat(found) if found else none)

    def _allocate(self, like: Tensor) -> Tensor:
        """Host memory for a copy of `like`."""
        taken = -(-like.nbytes // 64) * 64
        if self._free.numel() < taken:
            self._free = torch.empty(max(BLOCK_BYTES, taken), dtype=torch.uint8, pin_memory=like.is_cuda)
        block, self._free = self._free[: like.nbytes], self._free[taken:]
        return block.view(like.dtype)


def _differing(new: Tensor, kept: Tensor) -> Tensor:
    """int64 positions at which two flat tensors of integers differ, where `new` is; `kept` is in host memory.
    On the CPU NumPy is four times as fast as torch."""
    if new.is_cuda:
        return (new != kept.to(new.device, non_blocking=True)).nonzero().flatten()
    return torch.from_numpy(np.flatnonzero(new.numpy() != kept.numpy()))


class DeltaTransport:
    """`Transport` that sends deltas through another one, `transport`, where it can.

    full_every: every `full_every`-th update of a server is complete, and others where that is needed. `expect` has to
    be called before each `send`. Attributes after a `send`: `full`, whether it was complete; `sent_bytes`, what the
    servers were sent; `changed`, the fraction of elements that a delta had.
    """

    def __init__(self, transport: Transport, full_every: int) -> None:
        self._transport, self._full_every = transport, full_every
        self._kept = SentWeights()
        self._base: str | None = None  # label of the weights in `_kept`
        self._held: Mapping[str, str] = {}
        self._deltas: dict[str, int] = {}  # URL -> deltas since its last complete update
        self.full, self.sent_bytes, self.changed = True, 0, 1.0

    @property
    def needs_session(self) -> bool:
        return self._transport.needs_session

    def expect(self, held: Mapping[str, str]) -> None:
        """`held`: URL -> label that the server reports, before the next `send` has paused and relabelled it."""
        self._held = dict(held)

    def forget(self) -> None:
        """The next update is complete: what the servers have is not known."""
        self._base = None

    def send(self, receivers: Sequence[Receiver], tensors: NamedTensors, label: str) -> dict[str, str]:
        self.full = not all(self._takes_delta(receiver.url) for receiver in receivers)
        self._held = {}
        self._base = None  # until all tensors are kept
        failures = self._transport.send(receivers, self._encoded(tensors, label), label)
        for receiver in receivers:
            self._deltas[receiver.url] = 0 if self.full else self._deltas[receiver.url] + 1
        if not self.full and (why := next((why for why in failures.values() if UNKNOWN in why), None)):
            log.warning("no deltas of the weights are sent from now on, all updates are complete: %s", why)
            self._full_every = 1
        return failures

    def close(self) -> None:
        self._transport.close()

    def _takes_delta(self, url: str) -> bool:
        """Whether the server has the weights that are kept, and is not due for a complete update."""
        is_base = self._base is not None and self._held.get(url) == self._base
        return is_base and self._deltas[url] + 1 < self._full_every

    def _encoded(self, tensors: NamedTensors, label: str) -> Iterator[tuple[str, Tensor]]:
        """The tensors as they are sent: all, or what has changed. Unchanged ones are left out, and one of which so much
        has changed that its delta would be larger is sent as it is."""
        self.sent_bytes = changed = elements = 0
        for name, tensor in tensors:
            encoded: tuple[str, Tensor] | None = (name, tensor)
            if self.full:
                self._kept.keep(name, tensor)
            else:
                changes = self._kept.changes(name, tensor)
                changed += changes.changed
                if not changes.changed:
                    encoded = None
                elif changes.payload.nbytes < tensor.nbytes:
                    encoded = (changes.encoded_name, changes.payload)
            elements += tensor.numel()
            if encoded is not None:
                self.sent_bytes += encoded[1].nbytes
                yield encoded
        self.changed = 1.0 if self.full else changed / max(elements, 1)
        self._base = label

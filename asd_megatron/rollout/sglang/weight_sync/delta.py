"""Weight updates that carry only the elements that have changed since the last one.

At a learning rate of 1e-6 an update changes less than one element in a hundred of a bfloat16 model, because a bfloat16
number moves by steps of 1/256 of itself. Every sender keeps its weights as they were last sent in host memory, compares
bit by bit, and sends of each tensor positions and new values (`plugin/asd_weight_delta.py` has the format, and applies
it in the server). Nothing is added up, so base and deltas are exactly the trainer's weights, and checksums are compared
after a delta as after a complete update.

A delta only goes to servers that reported the label of its base before they were paused. Every other case is a complete
update for all servers of that transmission: the first one, a server that was restarted or failed, every n-th update.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Carried:
    """What one update sends: its bytes, and how many of the elements it looked at had changed (0 in a complete one)."""

    bytes: int = 0
    changed: int = 0
    elements: int = 0

    def __add__(self, other: Carried) -> Carried:
        return Carried(self.bytes + other.bytes, self.changed + other.changed, self.elements + other.elements)


class Deltas:
    """What has changed since the last update, of the tensors that this rank sends. Each rank of the trainer has one.

    Global rank 0 decides on an update (`decide`, for which `expect` has to be called before each) and hears how it
    ended (`conclude`); every sender keeps a copy of its own tensors, and encodes them (`begin`, then `encoded`).

    full_every: every `full_every`-th update of a server is complete, and others where that is needed. Attributes after
    an update, on global rank 0: `full`, whether it was complete; `sent_bytes`, what each server was sent; `changed`,
    the fraction of elements that a delta had.
    """

    def __init__(self, full_every: int) -> None:
        self._full_every = full_every
        self._kept = SentWeights()
        self._base: str | None = None  # label of the weights that all senders have kept
        self._held: Mapping[str, str] = {}
        self._deltas: dict[str, int] = {}  # URL -> deltas since its last complete update
        self.full, self.sent_bytes, self.changed = True, 0, 1.0
        self.carried = Carried()  # by this rank, in the current update

    # ---------------------------------------------------------------- global rank 0

    def expect(self, held: Mapping[str, str]) -> None:
        """`held`: URL -> label that the server reports, before an update has paused and relabelled it."""
        self._held = dict(held)

    def forget(self) -> None:
        """The next update is complete: what the servers have is not known."""
        self._base = None

    def decide(self, urls: Sequence[str]) -> bool:
        """Whether the update of these servers has to be complete."""
        full = not all(self._takes_delta(url) for url in urls)
        self._held = {}
        self._base = None  # until all tensors are kept
        return full

    def conclude(self, urls: Sequence[str], failures: Mapping[str, str], label: str | None, carried: Carried) -> None:
        """An update of these servers has ended. failures: URL -> reason, of those that lack it. label: of the weights
        that every sender has kept; None: not every one has. carried: by all senders."""
        self._base, self.sent_bytes = label, carried.bytes
        self.changed = 1.0 if self.full else carried.changed / max(carried.elements, 1)
        for url in urls:
            self._deltas[url] = 0 if self.full else self._deltas[url] + 1
        if not self.full and (why := next((why for why in failures.values() if UNKNOWN in why), None)):
            log.warning("no deltas of the weights are sent from now on, all updates are complete: %s", why)
            self._full_every = 1

    def _takes_delta(self, url: str) -> bool:
        """Whether the server has the weights that are kept, and is not due for a complete update."""
        is_base = self._base is not None and self._held.get(url) == self._base
        return is_base and self._deltas[url] + 1 < self._full_every

    # ---------------------------------------------------------------- every sender

    def begin(self, full: bool) -> None:
        """An update begins, as global rank 0 has decided."""
        self.full, self.carried = full, Carried()

    def encoded(self, tensors: NamedTensors) -> Iterator[tuple[str, Tensor]]:
        """The tensors as they are sent: all, or what has changed. Unchanged ones are left out, and one of which so much
        has changed that its delta would be larger is sent as it is."""
        for name, tensor in tensors:
            encoded: tuple[str, Tensor] | None = (name, tensor)
            changed = 0
            if self.full:
                self._kept.keep(name, tensor)
            else:
                changes = self._kept.changes(name, tensor)
                changed = changes.changed
                if not changed:
                    encoded = None
                elif changes.payload.nbytes < tensor.nbytes:
                    encoded = (changes.encoded_name, changes.payload)
            self.carried += Carried(0 if encoded is None else encoded[1].nbytes, changed, tensor.numel())
            if encoded is not None:
                yield encoded


class DeltaTransport:
    """`Transport` that sends deltas through another one, `transport`, where it can. Where other ranks take part in a
    transfer, `Sending` has the `deltas` and the inner transport instead."""

    def __init__(self, transport: Transport, deltas: Deltas) -> None:
        self.transport, self.deltas = transport, deltas

    @property
    def needs_session(self) -> bool:
        return self.transport.needs_session

    def send(self, receivers: Sequence[Receiver], tensors: NamedTensors, label: str) -> dict[str, str]:
        urls = [receiver.url for receiver in receivers]
        self.deltas.begin(self.deltas.decide(urls))
        failures = self.transport.send(receivers, self.deltas.encoded(tensors), label)
        self.deltas.conclude(urls, failures, label, self.deltas.carried)
        return failures

    def close(self) -> None:
        self.transport.close()

"""One transfer of the weights, in which all ranks of the trainer take part.

Each pipeline stage's first rank sends that stage's tensors (a sender). All ranks go through the same buckets in the
same order; what they have to know of each other travels over the host group:

    global rank 0                      a sender                            every other rank
    say which servers, all or a delta  hear it                             hear it
    hear what the bucket holds         fill and hash the bucket, say it    hear it (and take part in its gathers)
    say how the last bucket went       hear it                             hear it
    requests to the servers            the data, as the transport has it
    collect everybody's checksums      give them                           give none

A failure on global rank 0 or on a sender is said in place of the next message, so that every rank leaves the transfer
at the same bucket.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from asd_megatron.distributed.objects import Told, broadcast_object, gather_objects
from asd_megatron.models.export import Block, Step
from asd_megatron.rollout.sglang.weight_sync.buckets import Bucket, Contents, Slots, fill
from asd_megatron.rollout.sglang.weight_sync.checksums import Digests, ServerChecksums
from asd_megatron.rollout.sglang.weight_sync.delta import Carried, Deltas
from asd_megatron.rollout.sglang.weight_sync.protocol import Receiver, TransferIncomplete
from asd_megatron.rollout.sglang.weight_sync.quantize import quantized
from asd_megatron.rollout.sglang.weight_sync.verification import WeightVerifier

log = logging.getLogger(__name__)
T = TypeVar("T")


class Stopped(Exception):
    """Another rank said that it failed, and reports it; or this one did, and global rank 0 reports it."""


@dataclass(frozen=True)
class Addressees:
    """The servers of a transfer, in order: their URLs and tensor-parallel sizes."""

    urls: tuple[str, ...] = ()
    tensor_parallel: tuple[int, ...] = ()

    @classmethod
    def of(cls, receivers: Sequence[Receiver]) -> Addressees:
        return cls(tuple(r.url for r in receivers), tuple(r.tensor_parallel for r in receivers))


@dataclass(frozen=True)
class Parcel:
    """The next bucket, known to every rank; its data is on global rank `sender` alone."""

    sender: int
    contents: Contents
    bucket: Bucket | None


class Parcels(Protocol):
    """The buckets of one transfer on this rank. Iterating is collective, and so is `share`."""

    rank: int
    senders: tuple[int, ...]
    addressees: Addressees

    def __iter__(self) -> Iterator[Parcel]: ...

    def share(self, value: T | None, error: Exception | None = None, src: int = 0) -> T:
        """Rank `src`'s value on every rank. If it gives an error instead, that is raised on global rank 0, which
        reports it, and `Stopped` on all others."""
        ...

    def collect(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on global rank 0; [] elsewhere. Collective."""
        ...


@dataclass
class OneRank:
    """`Parcels` of buckets that global rank 0 has alone; no other rank takes part."""

    buckets: Iterator[Bucket]
    addressees: Addressees
    rank: int = 0
    senders: tuple[int, ...] = (0,)

    def __iter__(self) -> Iterator[Parcel]:
        return (Parcel(0, bucket.contents, bucket) for bucket in self.buckets)

    def share(self, value: T | None, error: Exception | None = None, src: int = 0) -> T:
        if error is not None:
            raise error
        return value  # type: ignore[return-value]

    def collect(self, value: T) -> list[T]:
        return [value]


@dataclass(frozen=True)
class Sent:
    """What one rank has sent: bytes and tensors of the model, and what a delta has made of them."""

    bytes: int = 0
    tensors: int = 0
    digests: Digests = field(default_factory=dict)
    carried: Carried = Carried()
    failure: Exception | None = None


class CollectiveTransport(Protocol):
    """A transport in which all ranks of the trainer take part."""

    def run(self, receivers: Sequence[Receiver], parcels: Parcels) -> dict[str, str]:
        """Transfer every bucket to every receiver (known to global rank 0 alone). Returns URL -> reason for those whose
        transfer is incomplete, on global rank 0. Collective.

        Raises TransferIncomplete when it is for all, and what else failed, on global rank 0; `Stopped` elsewhere.
        """
        ...

    def close(self) -> None:
        """Release what is shared with the servers. May be called twice."""
        ...


class StepSource(Protocol):
    """Weights that each pipeline stage's first rank has (`WeightSource.steps`)."""

    def steps(self, bucket_bytes: int) -> Iterator[Step]: ...


@dataclass(frozen=True)
class Sending:
    """How the trainer's ranks send weights; each has one.

    host: all ranks on gloo. senders: the global ranks on which steps have tensors. device: where buckets are filled.
    quantize: matrices are sent in block-wise FP8. deltas: what has changed since the last update, on every rank; None:
    every update is complete. verifier: of the servers' checksums, on every rank.
    """

    transport: CollectiveTransport
    host: dist.ProcessGroup
    senders: Sequence[int]
    device: torch.device
    bucket_bytes: int
    quantize: bool = False
    deltas: Deltas | None = None
    verifier: WeightVerifier | None = None

    def transfer(self, weights: StepSource) -> Transfer:
        return Transfer(self, weights.steps(self.bucket_bytes))


class Transfer:
    """`Parcels` of the weights' steps (`ModelPort.export_steps`), which every rank goes through.

    On the CPU a bucket is hashed by a thread while it is in flight; a bucket's memory is used again only when its hash
    is complete. Of a delta the full tensors are hashed, while they are compared.
    """

    def __init__(self, settings: Sending, steps: Iterator[Step]) -> None:
        self.rank, self.senders, self.addressees = settings.host.rank(), tuple(settings.senders), Addressees()
        self._settings, self._steps = settings, steps
        self._slots = Slots(settings.bucket_bytes)
        self._checksums: ServerChecksums | None = None
        on_cpu = settings.device.type == "cpu"
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="weight-hash") if on_cpu else None
        self._hashing: deque[Future[None]] = deque()  # of the buckets whose memory is still in use
        self._begun = self._stopped = False
        self.sent = Sent()  # on global rank 0, once finished: by all ranks

    def take_part(self, receivers: Sequence[Receiver] = (), label: str = "") -> dict[str, str]:
        """The complete transfer. Every rank calls it once, global rank 0 with the receivers and the weights' label.
        Returns there URL -> reason for those whose transfer is incomplete, and raises what failed; the other ranks
        return {} in any case."""
        self._begun = True
        deltas, urls = self._settings.deltas, [receiver.url for receiver in receivers]
        full = deltas is None or self.rank != 0 or deltas.decide(urls)
        self.addressees, full = self.share((Addressees.of(receivers), full))
        if deltas is not None:
            deltas.begin(full)
        verifier = self._settings.verifier
        if verifier is not None:
            self._checksums = verifier.start(self.addressees.tensor_parallel)
        try:
            if not self.addressees.urls:
                return {}
            failures = self._settings.transport.run(receivers, self)
            self._finish()
            self._conclude(urls, failures, label)
            return failures
        except TransferIncomplete as error:
            self._conclude(urls, error.failures, None)
            return error.failures
        except Stopped:
            return {}
        finally:
            self._close()

    def cancel(self) -> None:
        """Tell the other ranks that nothing is sent, if `take_part` has not been called. Global rank 0."""
        if not self._begun:
            self.take_part()

    def __iter__(self) -> Iterator[Parcel]:
        for step in self._steps:
            bucket: Bucket | None = None
            error: Exception | None = None
            if step.sender == self.rank:
                try:
                    bucket = self._fill(step.blocks)
                except Exception as failed:  # every rank waits to hear of the bucket
                    error = failed
            contents = self.share(None if bucket is None else bucket.contents, error, step.sender)
            if not contents.names:  # nothing of the step has changed
                continue
            yield Parcel(step.sender, contents, bucket)

    def share(self, value: T | None, error: Exception | None = None, src: int = 0) -> T:
        told = None if error is None else Told.of(error)
        failures = error.failures if isinstance(error, TransferIncomplete) else None
        found, told, failures = broadcast_object((value, told, failures), src, self._settings.host)
        if told is None:
            return found  # type: ignore[return-value]
        self._stopped = True
        if self.rank != 0:
            if error is not None:
                log.error("weights could not be sent", exc_info=error)
            raise Stopped(told.message)
        if error is not None:
            raise error
        if failures is not None:  # of servers, which are sent everything again
            raise TransferIncomplete(failures)
        raise told.error(f"global rank {src} could not send its weights")

    def collect(self, value: T) -> list[T]:
        return gather_objects(value, 0, self._settings.host) or []

    def _finish(self) -> None:
        """After the last bucket: global rank 0 collects what every rank has sent, and the verifier their checksums.
        Raises there what hashing raised anywhere, or RuntimeError if tensors are missing."""
        mine = self.sent
        try:
            self._wait_for_hashes(0)
            digests = {} if self._checksums is None else self._checksums.digests()
            carried = Carried() if self._settings.deltas is None else self._settings.deltas.carried
            mine = Sent(mine.bytes, mine.tensors, digests, carried)
        except Exception as error:
            mine = Sent(failure=error)
        found = self.collect(mine)
        if not found:
            return
        if (failure := next((sent.failure for sent in found if sent.failure), None)) is not None:
            raise failure
        carried = sum((sent.carried for sent in found), Carried())
        self.sent = Sent(sum(sent.bytes for sent in found), sum(sent.tensors for sent in found), carried=carried)
        if self._checksums is not None:
            for sent in found[1:]:
                self._checksums.merge(sent.digests)
            self._checksums.check_complete()

    def _close(self) -> None:
        """End hashing; after a failure that all ranks have heard of, take part in the remaining gathers."""
        if self._hasher is not None:
            self._hasher.shutdown(cancel_futures=True)
        if self._stopped:
            for _ in self._steps:
                pass

    def _conclude(self, urls: Sequence[str], failures: dict[str, str], label: str | None) -> None:
        if self._settings.deltas is not None and self.rank == 0:
            self._settings.deltas.conclude(urls, failures, label, self.sent.carried)

    def _fill(self, blocks: Sequence[Block]) -> Bucket:
        self._wait_for_hashes(1)  # two buckets ago the same memory was used
        settings, deltas = self._settings, self._settings.deltas
        if settings.quantize:
            blocks = [Block.of(*item) for item in quantized(_tensors(blocks))]
        names, size = sum(len(block.names) for block in blocks), sum(block.nbytes for block in blocks)
        self.sent = Sent(self.sent.bytes + size, self.sent.tensors + names)
        if deltas is None or deltas.full:
            bucket, placed = fill(blocks, self._slots, settings.device)
            self._hash(placed)
            if deltas is not None:
                for _ in deltas.encoded(_tensors(blocks)):
                    pass  # kept, to compare the next update with them
            return bucket
        self._hash([(Block.of(name, tensor), tensor[None]) for name, tensor in _tensors(blocks)])
        changed = [Block.of(*item) for item in deltas.encoded(_tensors(blocks))]
        bucket, _ = fill(changed, self._slots, settings.device)
        self._wait_for_hashes(0)  # the tensors are valid until the next step
        return bucket

    def _hash(self, placed: Sequence[tuple[Block, Tensor]]) -> None:
        """Hash tensors, in a thread on the CPU."""
        if self._checksums is None:
            return
        if self._hasher is None:
            _add(self._checksums, placed)
        else:
            self._hashing.append(self._hasher.submit(_add, self._checksums, placed))

    def _wait_for_hashes(self, but: int) -> None:
        """Until all buckets but the last `but` are hashed. Raises what hashing raised."""
        while len(self._hashing) > but:
            self._hashing.popleft().result()


def _add(checksums: ServerChecksums, placed: Sequence[tuple[Block, Tensor]]) -> None:
    for block, tensors in placed:
        checksums.add(block.names, tensors)


def _tensors(blocks: Sequence[Block]) -> Iterator[tuple[str, Tensor]]:
    return chain.from_iterable(block.tensors() for block in blocks)

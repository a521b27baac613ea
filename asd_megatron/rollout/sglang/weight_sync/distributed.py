"""Weights over process groups: each sender of the trainer broadcasts to every rank of every server."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import torch

from asd_megatron.rollout.sglang.weight_sync.buckets import BUCKET_BYTES, pack
from asd_megatron.rollout.sglang.weight_sync.protocol import (
    SLACK_SECONDS,
    NamedTensors,
    Receiver,
    TransferIncomplete,
    ask,
    ask_all,
    drain,
    incomplete,
    reason,
)
from asd_megatron.rollout.sglang.weight_sync.transfer import Addressees, OneRank, Parcel, Parcels
from asd_megatron.rollout.sglang.weight_sync.update_group import GroupEnd, Invitation, invite, leave_group


@dataclass
class _Flight:
    """A bucket in flight: the servers' answers, by URL, on global rank 0; the broadcast, on its sender."""

    broadcast: Future[None] | None
    answers: dict[str, Future[dict[str, Any]]]
    deadline: float


class DistributedTransport:
    """Weights through torch.distributed: NCCL between GPUs, gloo between CPUs. A `Transport` for tensors that global
    rank 0 has, a `CollectiveTransport` for those of several senders.

    Each sender has a group with all ranks of all servers. Groups are created at first use, kept while the servers stay
    the same, and created again after any failure, or when a server no longer knows one (as after a restart): one
    server's failure is a failure of all, and all must be sent everything again. A server loads one bucket at a time,
    whoever sends it; the next one is filled (and gathered from the trainer's other ranks) meanwhile.

    device: where buckets are packed. address: the interface of this machine that servers reach (None: found from their
    URLs). timeout: seconds in which a bucket has to arrive and be loaded. A server that dies is noticed at once, one
    that hangs after `timeout`.
    """

    needs_session = True

    def __init__(
        self,
        device: torch.device,
        *,
        address: str | None = None,
        bucket_bytes: int = BUCKET_BYTES,
        timeout: float = 120.0,
    ) -> None:
        self._device, self._address = device, address
        self._bucket_bytes, self._timeout = bucket_bytes, timeout
        self._end: GroupEnd | None = None  # this sender's
        self._groups: dict[int, Invitation] = {}  # by sender, on global rank 0
        self._members: tuple[Receiver, ...] = ()  # of those groups
        self._pool: ThreadPoolExecutor | None = None

    def send(self, receivers: Sequence[Receiver], tensors: NamedTensors, label: str) -> dict[str, str]:
        tensors = iter(tensors)
        failures: dict[str, str] = {}
        if receivers:
            parcels = OneRank(pack(tensors, self._bucket_bytes, self._device), Addressees.of(receivers))
            try:
                failures = self.run(receivers, parcels)
            except TransferIncomplete as error:
                failures = error.failures
        drain(tensors)
        return failures

    def run(self, receivers: Sequence[Receiver], parcels: Parcels) -> dict[str, str]:
        try:
            if not parcels.share(self._connected(receivers)):
                self._connect(receivers, parcels)
            self._send_all(receivers, parcels)
        except BaseException:
            self.close()  # ends the wait of servers for our broadcast
            raise
        return {}

    def close(self) -> None:
        """Leave the update groups; global rank 0 has the servers leave too."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)
        end, self._end = self._end, None
        if end is not None:
            end.close()
        groups, self._groups = self._groups, {}
        for invitation in groups.values():
            leave_group(self._members, invitation.name)

    # ---------------------------------------------------------------- groups

    def _connected(self, receivers: Sequence[Receiver]) -> bool:
        """Whether the groups are those of these servers, and each server still knows them: one that does loads an
        update of no tensors. Global rank 0; False elsewhere."""
        ours, theirs = ([(r.url, r.tensor_parallel) for r in rs] for rs in (self._members, receivers))
        if not self._groups or ours != theirs:
            return False

        def knows(receiver: Receiver) -> None:
            for invitation in self._groups.values():
                body = {"names": [], "dtypes": [], "shapes": [], "group_name": invitation.name, "flush_cache": False}
                ask(receiver, "/update_weights_from_distributed", body, self._timeout)

        return not ask_all(receivers, knows, self._timeout + SLACK_SECONDS)[1]

    def _connect(self, receivers: Sequence[Receiver], parcels: Parcels) -> None:
        """Create every sender's group. Collective."""
        self.close()
        self._members = tuple(receivers)
        self._pool = ThreadPoolExecutor(1 + len(receivers), thread_name_prefix="weight-sync")
        for sender in parcels.senders:
            self._create(sender, receivers, parcels)

    def _create(self, sender: int, receivers: Sequence[Receiver], parcels: Parcels) -> None:
        """The group of one sender: it listens, the servers are invited, all join. Collective."""
        error: Exception | None = None
        end: GroupEnd | None = None
        if parcels.rank == sender:
            to = parcels.addressees
            try:
                end = GroupEnd(to.urls, to.tensor_parallel, self._device, self._address, self._timeout)
            except Exception as failed:
                error = failed
        invitation = parcels.share(None if end is None else end.invitation, error, sender)
        if parcels.rank == 0:
            error = invite(receivers, invitation, self._timeout)
        try:
            parcels.share(None, error)
            error = end.joined() if end is not None else None
            parcels.share(None, error, sender)
        except BaseException:
            if end is not None:
                end.close()
            raise
        self._end = end or self._end
        if parcels.rank == 0:
            self._groups[sender] = invitation

    # ---------------------------------------------------------------- buckets

    def _send_all(self, receivers: Sequence[Receiver], parcels: Parcels) -> None:
        flight: _Flight | None = None
        for parcel in parcels:
            self._land(flight, receivers, parcels)
            flight = self._launch(parcel, receivers, first=flight is None)
        self._land(flight, receivers, parcels)

    def _launch(self, parcel: Parcel, receivers: Sequence[Receiver], *, first: bool) -> _Flight:
        """Request the bucket's loading, on global rank 0, and broadcast it, on its sender. The servers are paused, so
        their caches need be flushed but once."""
        assert self._pool is not None
        broadcast, answers = None, {}
        if receivers:
            body = {
                **parcel.contents.description(),
                "group_name": self._groups[parcel.sender].name,
                "load_format": "flattened_bucket",
                "flush_cache": first,
            }
            path, seconds = "/update_weights_from_distributed", self._timeout + SLACK_SECONDS
            answers = {r.url: self._pool.submit(ask, r, path, body, seconds) for r in receivers}
        if parcel.bucket is not None:
            assert self._end is not None
            if self._device.type == "cuda":
                torch.cuda.current_stream(self._device).synchronize()  # the bucket is filled
            broadcast = self._pool.submit(self._end.broadcast, parcel.bucket.data)
        return _Flight(broadcast, answers, time.monotonic() + self._timeout)

    def _land(self, flight: _Flight | None, receivers: Sequence[Receiver], parcels: Parcels) -> None:
        """Wait until every server has loaded the bucket. If not, every rank leaves: TransferIncomplete on global rank
        0, `Stopped` elsewhere."""
        loaded = flight is None or parcels.rank != 0 or self._loaded(flight)
        if parcels.share(loaded):
            if flight is not None and flight.broadcast is not None:
                wait([flight.broadcast])  # every server has it
            return
        assert flight is not None
        self._abort(flight)
        self.close()  # servers that waited for a broadcast answer with an error now
        parcels.share(None, self._failure(flight, receivers) if parcels.rank == 0 else None)

    def _loaded(self, flight: _Flight) -> bool:
        futures: list[Future[Any]] = [*flight.answers.values()]
        if flight.broadcast is not None:
            futures.append(flight.broadcast)
        done, late = wait(futures, max(0.0, flight.deadline - time.monotonic()), FIRST_EXCEPTION)
        return not late and not any(future.exception() for future in done)

    def _abort(self, flight: _Flight) -> None:
        """End this rank's broadcast, if it has one."""
        if flight.broadcast is not None and self._end is not None:
            self._end.abort()
            wait([flight.broadcast], max(0.0, flight.deadline - time.monotonic()) + SLACK_SECONDS)

    def _failure(self, flight: _Flight, receivers: Sequence[Receiver]) -> TransferIncomplete:
        """Why not every server has loaded the bucket."""
        wait(flight.answers.values(), SLACK_SECONDS)
        failures = {}
        for url, future in flight.answers.items():
            if not future.done():
                failures[url] = f"did not load its weights within {self._timeout:g} s (rollout.weight_sync_timeout)"
            elif (error := future.exception()) is not None:
                failures[url] = reason(error)
        return TransferIncomplete(incomplete(receivers, failures, "another server failed, which ended the update"))

"""Weights over a process group: broadcast from the trainer's rank 0 to every rank of every server."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from asd_megatron.rollout.sglang.weight_sync.buckets import BUCKET_BYTES, Bucket, pack
from asd_megatron.rollout.sglang.weight_sync.protocol import (
    SLACK_SECONDS,
    NamedTensors,
    Receiver,
    TransferIncomplete,
    ask,
    drain,
    incomplete,
    reason,
)
from asd_megatron.rollout.sglang.weight_sync.update_group import UpdateGroup


@dataclass
class _Flight:
    """A bucket in flight: our broadcast and the servers' answers, by URL."""

    bucket: Bucket
    may_retry: bool
    broadcast: Future[None]
    answers: dict[str, Future[dict[str, Any]]]
    deadline: float


class DistributedTransport:
    """`Transport` through torch.distributed: NCCL between GPUs, gloo between CPUs.

    The group is created at first use, kept while the servers stay the same, and created again after any failure: one
    server's failure is a failure of all, and all must be sent everything again. The next bucket is filled (and gathered
    from the trainer's other ranks) while the last one is broadcast and loaded.

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
        self._group: UpdateGroup | None = None
        self._pool: ThreadPoolExecutor | None = None

    def send(self, receivers: Sequence[Receiver], tensors: NamedTensors, label: str) -> dict[str, str]:
        tensors = iter(tensors)
        failures: dict[str, str] = {}
        try:
            if receivers:
                reused = self._connect(receivers)
                self._send_all(receivers, tensors, reused)
        except TransferIncomplete as error:
            self.close()
            failures = error.failures
        except BaseException:
            self.close()  # ends the wait of servers for our broadcast
            raise
        drain(tensors)
        return failures

    def close(self) -> None:
        """Leave the update group, on both sides."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)
        group, self._group = self._group, None
        if group is not None:
            group.close()

    def _connect(self, receivers: Sequence[Receiver]) -> bool:
        """Create the group of these servers, or keep it. Returns whether an earlier one is reused."""
        if self._group is not None and self._group.serves(receivers):
            return True
        self.close()
        self._group = UpdateGroup(receivers, self._device, self._address, self._timeout)
        self._pool = ThreadPoolExecutor(1 + len(receivers), thread_name_prefix="weight-sync")
        return False

    def _send_all(self, receivers: Sequence[Receiver], tensors: Iterator[tuple[str, Tensor]], reused: bool) -> None:
        flight: _Flight | None = None
        for bucket in pack(tensors, self._bucket_bytes, self._device):
            if flight is not None:
                self._land(flight, receivers)
            flight = self._launch(bucket, receivers, may_retry=reused and flight is None)
        if flight is not None:
            self._land(flight, receivers)

    def _launch(self, bucket: Bucket, receivers: Sequence[Receiver], *, may_retry: bool) -> _Flight:
        assert self._group is not None and self._pool is not None
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()  # the bucket is filled
        body = {
            **bucket.description(),
            "group_name": self._group.name,
            "load_format": "flattened_bucket",
            "flush_cache": True,
        }
        path, seconds = "/update_weights_from_distributed", self._timeout + SLACK_SECONDS
        answers = {r.url: self._pool.submit(ask, r, path, body, seconds) for r in receivers}
        broadcast = self._pool.submit(self._group.broadcast, bucket.data)
        return _Flight(bucket, may_retry, broadcast, answers, time.monotonic() + self._timeout)

    def _land(self, flight: _Flight, receivers: Sequence[Receiver]) -> None:
        """Wait until every server has loaded the bucket. Raises TransferIncomplete.

        A server that was restarted since the group was created is no longer in it: the first bucket is then sent again,
        in a new group.
        """
        futures: list[Future[Any]] = [flight.broadcast, *flight.answers.values()]
        done, late = wait(futures, max(0.0, flight.deadline - time.monotonic()), FIRST_EXCEPTION)
        if not late and not any(future.exception() for future in done):
            return
        in_time = time.monotonic() < flight.deadline
        assert self._group is not None
        self._group.abort()
        wait([flight.broadcast], max(0.0, flight.deadline - time.monotonic()) + SLACK_SECONDS)
        self.close()  # servers that waited for our broadcast answer with an error now
        if flight.may_retry and in_time:
            self._connect(receivers)
            self._land(self._launch(flight.bucket, receivers, may_retry=False), receivers)
            return
        wait(flight.answers.values(), SLACK_SECONDS)
        failures = {}
        for url, future in flight.answers.items():
            if not future.done():
                failures[url] = f"did not load its weights within {self._timeout:g} s (rollout.weight_sync_timeout)"
            elif (error := future.exception()) is not None:
                failures[url] = reason(error)
        raise TransferIncomplete(incomplete(receivers, failures, "another server failed, which ended the update"))

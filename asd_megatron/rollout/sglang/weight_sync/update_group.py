"""The process group that broadcasts weights: the trainer's rank 0, then every rank of every server."""

from __future__ import annotations

import importlib
import ipaddress
import socket
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor

from asd_megatron.errors import UserError
from asd_megatron.rollout.sglang.weight_sync.protocol import (
    SLACK_SECONDS,
    Receiver,
    TransferIncomplete,
    ask,
    ask_all,
    incomplete,
    reason,
)

JOIN_SECONDS = 60.0
LEAVE_SECONDS = 10.0
POLL_SECONDS = 0.002


class UpdateGroup:
    """The group of the trainer's rank 0 and these servers, created with the object; `name` on both sides.

    `device`: of the tensors to broadcast; NCCL for CUDA, gloo for the CPU. `timeout`: seconds for one broadcast.
    Raises TransferIncomplete if not every server has joined in time.
    """

    def __init__(
        self, receivers: Sequence[Receiver], device: torch.device, address: str | None, timeout: float
    ) -> None:
        self.name = f"weights-{uuid.uuid4().hex[:12]}"
        self._receivers, self._device, self._timeout = tuple(receivers), device, timeout
        self._backend = "nccl" if device.type == "cuda" else "gloo"
        self._daemon: dist.TCPStore | None = None
        self._group: dist.ProcessGroup | None = self._join(
            address or address_towards([receiver.url for receiver in receivers])
        )

    def serves(self, receivers: Sequence[Receiver]) -> bool:
        """Whether it is the group of exactly these servers."""
        ours, theirs = ([(r.url, r.tensor_parallel) for r in rs] for rs in (self._receivers, receivers))
        return ours == theirs

    def broadcast(self, data: Tensor) -> None:
        """Blocks until `data` is sent to every rank. Raises RuntimeError when a rank is gone, or after `timeout`."""
        assert self._group is not None, "the group was closed"
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor, options.asyncOp = 0, 0, True
        options.timeout = timedelta(seconds=self._timeout)
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # the current device is per thread
        work = self._group.broadcast([data], options)
        failure = ""
        try:
            while self._device.type == "cuda" and not work.is_completed():  # NCCL's `wait` only orders streams
                time.sleep(POLL_SECONDS)
            work.wait()
        except RuntimeError as error:
            failure = reason(error)
        del work  # it keeps the connections open, and a traceback would keep it
        if failure:
            raise RuntimeError(failure)

    def abort(self) -> None:
        """End a broadcast that hangs. NCCL only: gloo's ends by itself after `timeout`."""
        if self._device.type == "cuda" and self._group is not None:
            self._group.abort()

    def close(self) -> None:
        """Leave, and have the servers leave, which ends the wait of those that are in one of its broadcasts."""
        group, self._group, self._daemon = self._group, None, None
        if group is None:
            return
        _leave(group)
        del group  # with the last reference its connections close
        path, body = "/destroy_weights_update_group", {"group_name": self.name}
        ask_all(
            self._receivers, lambda receiver: ask(receiver, path, body, LEAVE_SECONDS), LEAVE_SECONDS + SLACK_SECONDS
        )

    def _join(self, address: str) -> dist.ProcessGroup:
        """Our end of the group, once all have joined."""
        seconds = min(JOIN_SECONDS, self._timeout)
        # The daemon is separate from our own client: without it, every wait for another rank to join ends.
        daemon: dist.TCPStore | None = _listen(address, seconds)
        assert daemon is not None
        not_created = f"the update group was not created at {address} (rollout.weight_sync_address)"
        try:
            # Before any server is asked: one that refuses ends the daemon, and a client that is not connected by then
            # tries to connect until its timeout.
            client = dist.TCPStore(address, daemon.port, None, False, timedelta(seconds=seconds))
        except RuntimeError as failed:
            raise TransferIncomplete(incomplete(self._receivers, {}, f"{not_created}: {reason(failed)}")) from failed
        bodies = self._invitations(address, daemon.port)

        def invite(receiver: Receiver) -> dict[str, Any]:
            return ask(receiver, "/init_weights_update_group", bodies[receiver.url], seconds + SLACK_SECONDS)

        pool = ThreadPoolExecutor(1 + len(bodies), thread_name_prefix="weight-sync")
        try:
            ours = pool.submit(self._make, client, seconds)
            theirs = {receiver.url: pool.submit(invite, receiver) for receiver in self._receivers}
            futures: list[Future[Any]] = [ours, *theirs.values()]
            done, late = wait(futures, seconds, FIRST_EXCEPTION)
            if late or any(future.exception() is not None for future in done):
                daemon = None
                wait(futures, seconds + 2 * SLACK_SECONDS)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        failures = {url: why for url, future in theirs.items() if (why := _why(future)) is not None}
        if not failures and _why(ours) is None:
            self._daemon = daemon
            return ours.result()
        ours.add_done_callback(_leave_when_joined)
        if ours.done() and (error := ours.exception()) is not None and not isinstance(error, RuntimeError):
            raise error  # stores and backends raise RuntimeError alone
        others = not_created if (why := _why(ours)) is None else f"{not_created}: {why}"
        raise TransferIncomplete(incomplete(self._receivers, failures, others))

    def _invitations(self, address: str, port: int) -> dict[str, dict[str, Any]]:
        """Each server's request to join, by URL. Its ranks follow those of the servers before it."""
        size = 1 + sum(receiver.tensor_parallel for receiver in self._receivers)
        bodies, offset = {}, 1
        for receiver in self._receivers:
            bodies[receiver.url] = {
                "master_address": address,
                "master_port": port,
                "rank_offset": offset,
                "world_size": size,
                "group_name": self.name,
                "backend": self._backend,
            }
            offset += receiver.tensor_parallel
        return bodies

    def _make(self, client: dist.TCPStore, seconds: float) -> dist.ProcessGroup:
        """Our end. torch's helper is private, but SGLang 0.5.23 creates its end with the same one
        (`init_custom_process_group`): both must use the same key names in the store, and no public function creates a
        group outside the default one.
        """
        c10d: Any = importlib.import_module("torch.distributed.distributed_c10d")

        size = 1 + sum(receiver.tensor_parallel for receiver in self._receivers)
        # gloo connects here, within `seconds`. NCCL connects at the first broadcast; its own timeout must be the longer
        # one, so that `broadcast` reports a slow broadcast before NCCL aborts it.
        limit = timedelta(seconds=2 * self._timeout if self._backend == "nccl" else seconds)
        store = dist.PrefixStore(self.name, client)
        group, _ = c10d._new_process_group_helper(
            size, 0, [], c10d.Backend(self._backend), store, group_name=self.name, timeout=limit
        )
        c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(size)}
        assert isinstance(group, dist.ProcessGroup)
        return group


def address_towards(urls: Sequence[str]) -> str:
    """The address of this machine's interface from which the servers at `urls` are reached."""
    for url in urls:
        host, port = urlsplit(url).hostname or "", urlsplit(url).port or 80
        try:
            family, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect(where)  # sends nothing
                address = str(probe.getsockname()[0])
        except OSError as error:
            raise UserError(f"the host of server {url} cannot be resolved ({error}): correct its address") from error
        if not ipaddress.ip_address(address).is_loopback:
            return address
    return "127.0.0.1"


def _listen(address: str, seconds: float) -> dist.TCPStore:
    """A store that listens on the interface `address` alone; torch's own would listen on all of them."""
    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    try:
        listener.bind((address, 0))
        listener.listen(1024)
        port = listener.getsockname()[1]
    except OSError as error:
        listener.close()
        raise UserError(
            f"rollout.weight_sync_address: {address} is no address of this machine ({error}): set it to the address of "
            "the interface that the servers reach"
        ) from error
    wait_at_most = timedelta(seconds=seconds)
    return dist.TCPStore(
        address, port, None, True, wait_at_most, wait_for_workers=False, master_listen_fd=listener.detach()
    )


def _why(future: Future[Any]) -> str | None:
    """Why there is no result; None if there is one."""
    if not future.done():
        return "no answer in time"
    error = future.exception()
    return None if error is None else reason(error)


def _leave_when_joined(joined: Future[dist.ProcessGroup]) -> None:
    if not joined.cancelled() and joined.exception() is None:
        _leave(joined.result())


def _leave(group: dist.ProcessGroup) -> None:
    with suppress(RuntimeError, ValueError):  # ValueError: it ended together with the default group
        dist.destroy_process_group(group)

"""The process group in which a sender broadcasts weights: a rank of the trainer, then every rank of every server."""

from __future__ import annotations

import importlib
import ipaddress
import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import accumulate
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
    reason,
)

JOIN_SECONDS = 60.0
LEAVE_SECONDS = 10.0
POLL_SECONDS = 0.002


@dataclass(frozen=True)
class Invitation:
    """A group that servers can join: where its sender listens. Its ranks are the sender (0), then every rank of every
    server, `ranks` in all; `offsets`: of each server's first one, by URL."""

    name: str
    backend: str
    address: str
    port: int
    ranks: int
    offsets: Mapping[str, int]

    def body(self, url: str) -> dict[str, Any]:
        """The request of the server at `url` to join."""
        return {
            "master_address": self.address,
            "master_port": self.port,
            "rank_offset": self.offsets[url],
            "world_size": self.ranks,
            "group_name": self.name,
            "backend": self.backend,
        }


class GroupEnd:
    """A sender's end of its group with the servers at `urls`, of these tensor-parallel sizes.

    It listens and joins in a thread from the start; the servers have to be invited (`invite`), on global rank 0, with
    its `invitation`. `device`: of the tensors to broadcast; NCCL for CUDA, gloo for the CPU. `address`: of the
    interface that the servers reach (None: found from their URLs). `timeout`: seconds for one broadcast.

    Raises UserError for an address of another machine, TransferIncomplete if nobody can connect.
    """

    def __init__(
        self,
        urls: Sequence[str],
        tensor_parallel: Sequence[int],
        device: torch.device,
        address: str | None,
        timeout: float,
    ) -> None:
        self._device, self._timeout, seconds = device, timeout, min(JOIN_SECONDS, timeout)
        address = address or address_towards(urls)
        # The daemon is separate from our own client: without it, every wait for another rank to join ends.
        self._daemon: dist.TCPStore | None = _listen(address, seconds)
        assert self._daemon is not None
        offsets = dict(zip(urls, accumulate(tensor_parallel, initial=1), strict=False))
        self.invitation = Invitation(
            f"weights-{uuid.uuid4().hex[:12]}",
            "nccl" if device.type == "cuda" else "gloo",
            address,
            self._daemon.port,
            1 + sum(tensor_parallel),
            offsets,
        )
        try:
            # Before any server is asked: one that refuses ends the daemon, and a client that is not connected by then
            # tries to connect until its timeout.
            client = dist.TCPStore(address, self._daemon.port, None, False, timedelta(seconds=seconds))
        except RuntimeError as failed:
            raise not_created(urls, {}, self.invitation, reason(failed)) from failed
        pool = ThreadPoolExecutor(1, thread_name_prefix="weight-sync")
        self._joining: Future[dist.ProcessGroup] | None = pool.submit(self._make, client, seconds)
        pool.shutdown(wait=False)

    def joined(self) -> Exception | None:
        """Wait until we have joined, as the servers have; why we have not, or None."""
        assert self._joining is not None
        done, _ = wait([self._joining], JOIN_SECONDS)
        error = self._joining.exception() if done else TimeoutError("no answer in time")
        if isinstance(error, (RuntimeError, TimeoutError)):  # stores and backends raise RuntimeError alone
            return not_created(list(self.invitation.offsets), {}, self.invitation, reason(error))
        assert error is None or isinstance(error, Exception)
        return error

    def broadcast(self, data: Tensor) -> None:
        """Blocks until `data` is sent to every rank. Raises RuntimeError when a rank is gone, or after `timeout`."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor, options.asyncOp = 0, 0, True
        options.timeout = timedelta(seconds=self._timeout)
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # the current device is per thread
        assert self._joining is not None, "the group was closed"
        work = self._joining.result().broadcast([data], options)
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
        if self._device.type == "cuda" and self._joining is not None and self._joining.done():
            self._joining.result().abort()

    def close(self) -> None:
        """Leave, which ends the wait of servers that are joining or in one of its broadcasts."""
        self._daemon = None
        joining, self._joining = self._joining, None
        if joining is not None:
            joining.add_done_callback(_leave_when_joined)

    def _make(self, client: dist.TCPStore, seconds: float) -> dist.ProcessGroup:
        """Our end. torch's helper is private, but SGLang 0.5.23 creates its end with the same one
        (`init_custom_process_group`): both must use the same key names in the store, and no public function creates a
        group outside the default one.
        """
        c10d: Any = importlib.import_module("torch.distributed.distributed_c10d")

        name, size = self.invitation.name, self.invitation.ranks
        # gloo connects here, within `seconds`. NCCL connects at the first broadcast; its own timeout must be the longer
        # one, so that `broadcast` reports a slow broadcast before NCCL aborts it.
        limit = timedelta(seconds=2 * self._timeout if self.invitation.backend == "nccl" else seconds)
        store = dist.PrefixStore(name, client)
        group, _ = c10d._new_process_group_helper(
            size, 0, [], c10d.Backend(self.invitation.backend), store, group_name=name, timeout=limit
        )
        c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(size)}
        assert isinstance(group, dist.ProcessGroup)
        return group


def invite(receivers: Sequence[Receiver], invitation: Invitation, timeout: float) -> TransferIncomplete | None:
    """Have every server join, in parallel; why the group was not created, as soon as one has failed, or None.
    `timeout`: seconds for one broadcast."""
    seconds = min(JOIN_SECONDS, timeout)

    def ask_to_join(receiver: Receiver) -> dict[str, Any]:
        path = "/init_weights_update_group"
        return ask(receiver, path, invitation.body(receiver.url), seconds + SLACK_SECONDS)

    pool = ThreadPoolExecutor(len(receivers), thread_name_prefix="weight-sync")
    answers = {receiver.url: pool.submit(ask_to_join, receiver) for receiver in receivers}
    pool.shutdown(wait=False)
    done, late = wait(answers.values(), seconds, FIRST_EXCEPTION)
    if not late and not any(future.exception() for future in done):
        return None
    failures = {
        url: reason(error)
        for url, future in answers.items()
        if future.done() and (error := future.exception()) is not None
    }
    return not_created([receiver.url for receiver in receivers], failures, invitation, "not every server joined")


def leave_group(receivers: Sequence[Receiver], name: str) -> None:
    """Have the servers leave the group `name`, which ends the wait of those that are in one of its broadcasts."""
    path, body = "/destroy_weights_update_group", {"group_name": name}
    ask_all(receivers, lambda receiver: ask(receiver, path, body, LEAVE_SECONDS), LEAVE_SECONDS + SLACK_SECONDS)


def not_created(
    urls: Sequence[str], failures: Mapping[str, str], invitation: Invitation, why: str
) -> TransferIncomplete:
    """That the group was not created: each server's own reason, or `why`."""
    others = f"the update group was not created at {invitation.address} (rollout.weight_sync_address): {why}"
    return TransferIncomplete({url: failures.get(url, others) for url in urls})


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


def _leave_when_joined(joined: Future[dist.ProcessGroup]) -> None:
    if not joined.cancelled() and joined.exception() is None:
        _leave(joined.result())


def _leave(group: dist.ProcessGroup) -> None:
    with suppress(RuntimeError, ValueError):  # ValueError: it ended together with the default group
        dist.destroy_process_group(group)

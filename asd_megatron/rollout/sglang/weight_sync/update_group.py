"""The process group that carries weights: the trainer's rank 0, then every rank of every server."""

from __future__ import annotations

import importlib
import ipaddress
import socket
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor

from asd_megatron.errors import UserError
from asd_megatron.rollout.sglang.weight_sync.protocol import NotWhole, Receiver, ask, ask_all, not_whole, reason

JOIN_SECONDS = 60.0
LEAVE_SECONDS = 10.0
SLACK_SECONDS = 5.0  # for a server to tell that its side gave up
POLL_SECONDS = 0.002


class UpdateGroup:
    """A group of these servers, made when the object is: `name` on both sides.

    `device`: where tensors to broadcast lie; NCCL for CUDA, gloo for the CPU. `timeout`: seconds for one broadcast.
    Raises NotWhole if not everybody has joined in time.
    """

    def __init__(
        self, receivers: Sequence[Receiver], device: torch.device, address: str | None, timeout: float
    ) -> None:
        self.name = f"weights-{uuid.uuid4().hex[:12]}"
        self._receivers, self._device, self._timeout = tuple(receivers), device, timeout
        self._backend = "nccl" if device.type == "cuda" else "gloo"
        self._daemon: dist.TCPStore | None = None
        self._group = self._join(address or address_towards([receiver.url for receiver in receivers]))

    def serves(self, receivers: Sequence[Receiver]) -> bool:
        """Whether it is the group of exactly these servers."""
        ours, theirs = ([(r.url, r.tensor_parallel) for r in rs] for rs in (self._receivers, receivers))
        return ours == theirs

    def broadcast(self, data: Tensor) -> None:
        """Blocks until `data` has left for every rank. Raises RuntimeError when a rank is gone, or after `timeout`."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor, options.asyncOp = 0, 0, True
        options.timeout = timedelta(seconds=self._timeout)
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # this may be another thread than the one that packed
        work = self._group.broadcast([data], options)
        failure = ""
        try:
            while self._device.type == "cuda" and not work.is_completed():  # its `wait` would only order streams
                time.sleep(POLL_SECONDS)
            work.wait()
        except RuntimeError as error:
            failure = reason(error)
        del work  # it holds the connections, and a traceback would hold it
        if failure:
            raise RuntimeError(failure)

    def abort(self) -> None:
        """End a broadcast that hangs, where that can be done: gloo's ends by itself after `timeout`."""
        if self._device.type == "cuda" and self._group is not None:
            self._group.abort()

    def close(self) -> None:
        """Leave, and have the servers leave: whoever waits in one of its broadcasts is set free."""
        group, self._group, self._daemon = self._group, None, None
        if group is None:
            return
        _leave(group)
        del group  # with the last reference its connections close
        path, body = "/destroy_weights_update_group", {"group_name": self.name}
        ask_all(self._receivers, lambda receiver: ask(receiver, path, body, LEAVE_SECONDS))

    def _join(self, address: str) -> Any:
        """Our end of the group, once all have joined."""
        seconds = min(JOIN_SECONDS, self._timeout)
        # The daemon is apart from our own client: with it end the waits of everybody who waits for somebody to join.
        daemon: dist.TCPStore | None = _listen(address, seconds)
        assert daemon is not None
        port, bodies = daemon.port, self._invitations(address, daemon.port)

        def invite(receiver: Receiver) -> dict[str, Any]:
            return ask(receiver, "/init_weights_update_group", bodies[receiver.url], seconds + SLACK_SECONDS)

        with ThreadPoolExecutor(1 + len(bodies), thread_name_prefix="weight-sync") as pool:
            ours = pool.submit(self._make, address, port, seconds)
            theirs = {receiver.url: pool.submit(invite, receiver) for receiver in self._receivers}
            _, late = wait([ours, *theirs.values()], seconds, FIRST_EXCEPTION)
            if late or ours.exception() is not None:
                daemon = None
        failures = {url: reason(error) for url, future in theirs.items() if (error := future.exception()) is not None}
        error = ours.exception()
        if error is not None and not isinstance(error, RuntimeError):  # stores and backends raise no other
            raise error
        if error is None and not failures:
            self._daemon = daemon
            return ours.result()
        if error is None:
            _leave(ours.result())
        others = "the update group was not made" + (f": {reason(error)}" if error is not None else "")
        raise NotWhole(not_whole(self._receivers, failures, others))

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

    def _make(self, address: str, port: int, seconds: float) -> Any:
        """Our end. torch's helper is private, but the one with which SGLang 0.5.23 makes its end
        (`init_custom_process_group`): both must name their keys in the store alike, and no public function makes a
        group outside the default one.
        """
        c10d: Any = importlib.import_module("torch.distributed.distributed_c10d")

        size = 1 + sum(receiver.tensor_parallel for receiver in self._receivers)
        client = dist.TCPStore(address, port, None, False, timedelta(seconds=seconds))
        # gloo meets here, within `seconds`. NCCL meets at the first broadcast, and must not abort a slow one itself.
        limit = timedelta(seconds=2 * self._timeout if self._backend == "nccl" else seconds)
        store = dist.PrefixStore(self.name, client)
        group, _ = c10d._new_process_group_helper(
            size, 0, [], c10d.Backend(self._backend), store, group_name=self.name, timeout=limit
        )
        c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(size)}
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
            raise UserError(f"the server {url} cannot be found from here ({error}): correct its address") from error
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
            f"{address} is no address of this machine on which servers could meet the trainer ({error}): give the "
            "address of the interface that they reach"
        ) from error
    wait_at_most = timedelta(seconds=seconds)
    return dist.TCPStore(
        address, port, None, True, wait_at_most, wait_for_workers=False, master_listen_fd=listener.detach()
    )


def _leave(group: Any) -> None:
    with suppress(RuntimeError, ValueError):  # ValueError: the default group has taken it along
        dist.destroy_process_group(group)

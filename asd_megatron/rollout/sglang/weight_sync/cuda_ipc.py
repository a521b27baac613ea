"""Weights by CUDA IPC handle: the server maps the trainer's memory and copies from it. For colocated servers.

SGLang's `/update_weights_from_tensor` unpickles its input, so it is used with our own servers on this machine alone.
The names that it allows in a pickle are those of SGLang 0.5.23 (`utils/common.py`, `SafeUnpickler`).
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from inspect import signature
from itertools import zip_longest
from multiprocessing.reduction import ForkingPickler
from types import MappingProxyType, SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
import torch.multiprocessing as torch_multiprocessing
from torch import Tensor
from torch.multiprocessing import reductions

from asd_megatron.distributed.addresses import is_loopback
from asd_megatron.errors import UserError
from asd_megatron.rollout.sglang.weight_sync.buckets import BUCKET_BYTES, Bucket, Slots, pack
from asd_megatron.rollout.sglang.weight_sync.protocol import SLACK_SECONDS, NamedTensors, Receiver, ask, drain, reason
from asd_megatron.rollout.sglang.weight_sync.transfer import Addressees, OneRank, Parcel, Parcels

REBUILD_ARGUMENTS = tuple(signature(reductions.rebuild_cuda_tensor).parameters)
"""What the handle of a CUDA tensor consists of, in torch of this process."""
DEVICE_ARGUMENT = 6  # `storage_device`: SGLang takes the device's UUID there, which is the same in both processes


class CudaIpcTransport:
    """Weights by CUDA IPC; by shared memory on the CPU. A `Transport` for tensors that global rank 0 has, a
    `CollectiveTransport` for those of several senders.

    Each rank of a server copies from the memory of a trainer's rank on its own device, so a bucket goes first to every
    trainer's rank that hosts one. A server's ranks must see the device of their host, in one IPC namespace.

    server_arguments: parameter names of torch's `rebuild_cuda_tensor` in the servers' environment. Both sides must
    agree on them, because the handle is the tuple of these arguments; versions of torch may differ. device: of the
    trainer's memory. world: the trainer's ranks (None: one rank). hosts: by server URL, the trainer's global rank that
    hosts each of its ranks, on global rank 0 alone; rank 0 hosts the ranks of a server that is left out. timeout:
    seconds for a server to load one bucket.
    """

    needs_session = True

    def __init__(
        self,
        server_arguments: Sequence[str],
        *,
        device: torch.device,
        world: dist.ProcessGroup | None = None,
        hosts: Mapping[str, Sequence[int]] = MappingProxyType({}),
        bucket_bytes: int = BUCKET_BYTES,
        timeout: float = 120.0,
    ) -> None:
        if tuple(server_arguments) != REBUILD_ARGUMENTS:
            raise UserError(
                f"rollout.weight_sync cuda_ipc: torch {torch.__version__} (trainer) and the servers' torch describe "
                f"shared CUDA memory differently ({_first_difference(REBUILD_ARGUMENTS, server_arguments)}): install "
                "the same torch on both sides, or set rollout.weight_sync disk"
            )
        self._device, self._world, self._hosts = device, world, hosts
        self._bucket_bytes, self._timeout = bucket_bytes, timeout

    def send(self, receivers: Sequence[Receiver], tensors: NamedTensors, label: str) -> dict[str, str]:
        tensors = iter(tensors)
        try:
            if not receivers:
                return {}
            return self.run(receivers, OneRank(pack(tensors, self._bucket_bytes), Addressees.of(receivers)))
        finally:
            drain(tensors)

    def run(self, receivers: Sequence[Receiver], parcels: Parcels) -> dict[str, str]:
        failures: dict[str, str] = {}
        flight: dict[str, Future[dict[str, Any]]] = {}
        slots = Slots(self._bucket_bytes)
        pool = ThreadPoolExecutor(max(1, len(receivers)), thread_name_prefix="weight-sync")
        try:
            hosts = parcels.share(*self._check_hosts(receivers))
            for number, parcel in enumerate(parcels):
                bucket = self._spread(parcel, {rank for ranks in hosts.values() for rank in ranks}, slots)
                self._land(flight, failures)
                hosts = parcels.share({url: ranks for url, ranks in hosts.items() if url not in failures})
                mine = (
                    {url: payloads(bucket, ranks.count(parcels.rank)) for url, ranks in hosts.items()} if bucket else {}
                )
                found = parcels.collect(mine)
                flight = {
                    r.url: pool.submit(self._post, r, _in_order(hosts[r.url], found, r.url), number == 0)
                    for r in receivers
                    if r.url in hosts
                }
            self._land(flight, failures)
            parcels.share(None)  # until then the buckets are in use
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        return failures

    def close(self) -> None:
        """Nothing is shared between two transfers."""

    def _check_hosts(self, receivers: Sequence[Receiver]) -> tuple[dict[str, tuple[int, ...]], UserError | None]:
        """The hosts of each receiver's ranks, and why one cannot be sent to. Global rank 0."""
        hosts = {r.url: tuple(self._hosts.get(r.url, (0,) * r.tensor_parallel)) for r in receivers}
        far = next((url for url in hosts if not is_loopback(urlsplit(url).hostname or "")), None)
        if far is None:
            return hosts, None
        return {}, UserError(
            f"the server {far} is not on this machine's loopback interface, so it cannot map the trainer's memory: set "
            "rollout.weight_sync distributed or disk"
        )

    def _spread(self, parcel: Parcel, hosts: set[int], slots: Slots) -> Bucket | None:
        """The parcel's bucket in memory of this rank; None where it hosts no server. Collective over all ranks, unless
        only the sender is a host."""
        if hosts <= {parcel.sender}:
            return parcel.bucket
        assert self._world is not None
        bucket = parcel.bucket
        if bucket is None:
            size = parcel.contents.nbytes
            bucket = Bucket(slots.take(size, self._device)[:size], parcel.contents)
        dist.broadcast(bucket.data, src=parcel.sender, group=self._world)
        return bucket

    def _post(self, receiver: Receiver, serialized: list[str], first: bool) -> dict[str, Any]:
        """Have the server load a bucket. It is paused, so its cache need be flushed but once."""
        body = {
            "serialized_named_tensors": serialized,
            "load_format": "flattened_bucket",
            "flush_cache": first,
        }
        return ask(receiver, "/update_weights_from_tensor", body, self._timeout)

    def _land(self, flight: dict[str, Future[dict[str, Any]]], failures: dict[str, str]) -> None:
        """Wait until the servers have loaded the bucket in flight."""
        done, _ = wait(flight.values(), self._timeout + SLACK_SECONDS)
        for url, future in flight.items():
            if future not in done:
                failures[url] = f"did not load its weights within {self._timeout:g} s (rollout.weight_sync_timeout)"
            elif (error := future.exception()) is not None:
                failures[url] = reason(error)


def _in_order(hosts: Sequence[int], found: Sequence[Mapping[str, list[str]]], url: str) -> list[str]:
    """The payload of each of a server's ranks, of those that their hosts have made, in their order."""
    left = {rank: iter(found[rank][url]) for rank in set(hosts)}
    return [next(left[rank]) for rank in hosts]


def payloads(bucket: Bucket, ranks: int) -> list[str]:
    """The bucket for each rank of a server, in base64. Its memory must not change until the server has answered.

    Each rank gets its own handle, because CUDA IPC counts one reference for each handle made and each one opened.
    """
    if bucket.data.is_cuda:
        torch.cuda.current_stream(bucket.data.device).synchronize()  # the bucket is filled
    return [base64.b64encode(_pickled(bucket)).decode() for _ in range(ranks)]


def _pickled(bucket: Bucket) -> bytes:
    metadata, start, contents = [], 0, bucket.contents
    for name, dtype, shape in zip(contents.names, contents.dtypes, contents.shapes, strict=True):
        size = dtype.itemsize * torch.Size(shape).numel()
        metadata.append(
            SimpleNamespace(
                name=name, shape=torch.Size(shape), dtype=dtype, start_idx=start, end_idx=start + size, numel=size
            )
        )
        start += size
    buffer = io.BytesIO()
    with _files_as_handles():
        ForkingPickler(buffer).dump({"flattened_tensor": _Shared(bucket.data), "metadata": metadata})
    return buffer.getvalue()


class _Shared:
    """Pickled as a handle of the tensor's memory."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def __reduce__(self) -> tuple[Any, ...]:
        rebuild, arguments = reductions.reduce_tensor(self._tensor)
        if self._tensor.is_cuda:
            uuid = str(torch.cuda.get_device_properties(self._tensor.device).uuid)
            arguments = (*arguments[:DEVICE_ARGUMENT], uuid, *arguments[DEVICE_ARGUMENT + 1 :])
        return rebuild, arguments


@contextmanager
def _files_as_handles() -> Iterator[None]:
    """Share CPU memory by file name: a file descriptor can only be passed to a child of this process."""
    before = torch_multiprocessing.get_sharing_strategy()
    torch_multiprocessing.set_sharing_strategy("file_system")
    try:
        yield
    finally:
        torch_multiprocessing.set_sharing_strategy(before)


def _first_difference(ours: Sequence[str], theirs: Sequence[str]) -> str:
    for number, (mine, other) in enumerate(zip_longest(ours, theirs, fillvalue="none"), 1):
        if mine != other:
            return f"argument {number} of rebuild_cuda_tensor is {mine} here and {other} there"
    return "equal"

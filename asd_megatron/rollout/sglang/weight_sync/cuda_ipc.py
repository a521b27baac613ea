"""Weights by handle: the server maps the trainer's memory and copies from it. For servers on the trainer's own devices.

SGLang's `/update_weights_from_tensor` unpickles what it gets, so it is used with our own servers on this machine alone.
What it allows in a pickle was read in SGLang 0.5.23 (`utils/common.py`, `SafeUnpickler`).
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.multiprocessing as torch_multiprocessing
from torch import Tensor
from torch.multiprocessing import reductions

from asd_megatron.distributed.addresses import is_loopback
from asd_megatron.errors import UserError
from asd_megatron.rollout.sglang.weight_sync.buckets import BUCKET_BYTES, Bucket, pack
from asd_megatron.rollout.sglang.weight_sync.protocol import NamedTensors, Receiver, ask, drain, reason

DEVICE_ARGUMENT = 6  # of torch's rebuild_cuda_tensor: SGLang takes a UUID there, which means the same in both processes


class CudaIpcTransport:
    """`Transport` by CUDA IPC; by shared memory on the CPU.

    Every server's ranks must see the trainer's device (the same CUDA_VISIBLE_DEVICES, one IPC namespace). server_torch:
    torch's version in the servers' environment, which must be the trainer's. timeout: seconds for a server to load one
    bucket.
    """

    needs_session = True

    def __init__(self, server_torch: str, *, bucket_bytes: int = BUCKET_BYTES, timeout: float = 120.0) -> None:
        ours, theirs = (version.split("+")[0] for version in (str(torch.__version__), server_torch))
        if ours != theirs:
            raise UserError(
                f"memory cannot be shared between torch {ours} (trainer) and torch {theirs} (SGLang): install the same "
                "version on both sides, or use the distributed transport"
            )
        self._bucket_bytes, self._timeout = bucket_bytes, timeout

    def send(self, receivers: Sequence[Receiver], tensors: NamedTensors, label: str) -> dict[str, str]:
        tensors = iter(tensors)
        failures: dict[str, str] = {}
        try:
            for receiver in receivers:
                _check_local(receiver.url)
            if receivers:
                self._send_all(receivers, tensors, failures)
        finally:
            drain(tensors)
        return failures

    def close(self) -> None:
        """Nothing is shared between two calls of `send`."""

    def _send_all(
        self, receivers: Sequence[Receiver], tensors: Iterator[tuple[str, Tensor]], failures: dict[str, str]
    ) -> None:
        flight: dict[str, Future[dict[str, Any]]] = {}
        with ThreadPoolExecutor(len(receivers), thread_name_prefix="weight-sync") as pool:
            for bucket in pack(tensors, self._bucket_bytes):
                _land(flight, failures)
                whole = [receiver for receiver in receivers if receiver.url not in failures]
                flight = {r.url: pool.submit(self._post, r, payloads(bucket, r.tensor_parallel)) for r in whole}
            _land(flight, failures)

    def _post(self, receiver: Receiver, serialized: list[str]) -> dict[str, Any]:
        body = {
            "serialized_named_tensors": serialized,
            "load_format": "flattened_bucket",
            "flush_cache": True,
        }
        return ask(receiver, "/update_weights_from_tensor", body, self._timeout)


def payloads(bucket: Bucket, ranks: int) -> list[str]:
    """The bucket for each rank of a server, in base64. Its memory must not change until the server has answered.

    Each rank gets a handle of its own, because a handle is counted once given and once taken.
    """
    if bucket.data.is_cuda:
        torch.cuda.current_stream(bucket.data.device).synchronize()  # the bucket is filled
    return [base64.b64encode(_pickled(bucket)).decode() for _ in range(ranks)]


def _pickled(bucket: Bucket) -> bytes:
    metadata, start = [], 0
    for name, dtype, shape in zip(bucket.names, bucket.dtypes, bucket.shapes, strict=True):
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
    """Pickles as a handle of the tensor's memory."""

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
    """Share CPU memory by file name: a file descriptor could only be handed to a child of this process."""
    before = torch_multiprocessing.get_sharing_strategy()
    torch_multiprocessing.set_sharing_strategy("file_system")
    try:
        yield
    finally:
        torch_multiprocessing.set_sharing_strategy(before)


def _land(flight: dict[str, Future[dict[str, Any]]], failures: dict[str, str]) -> None:
    wait(flight.values())
    for url, future in flight.items():
        if (error := future.exception()) is not None:
            failures[url] = reason(error)


def _check_local(url: str) -> None:
    if not is_loopback(urlsplit(url).hostname or ""):
        raise UserError(
            f"the server {url} is not on this machine's loopback interface, so it cannot map the trainer's memory: use "
            "the distributed transport"
        )

"""Python objects between ranks of one job. They travel by pickle, which is safe here: both ends are this program.

They travel over gloo: the group is `ProcessGroups.host`, or another of gloo's. Over NCCL a pickle would be copied to
the GPU and back, and the ranks would wait for a slow one under NCCL's short time limit.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from asd_megatron.distributed import activity
from asd_megatron.errors import UserError

T = TypeVar("T")
COLLECTIVES = ("all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list")


def broadcast_object(obj: T | None, src: int, group: dist.ProcessGroup) -> T:
    """`obj` of group rank `src`, on every rank of the group. Collective."""
    box: list[Any] = [obj]
    if group.size() > 1:
        _check(group)
        activity.count_collective(group)
        dist.broadcast_object_list(box, group=group, group_src=src)
    return box[0]


def gather_objects(obj: T, dst: int, group: dist.ProcessGroup) -> list[T] | None:
    """Every rank's object, in rank order, on group rank `dst`; None elsewhere. Collective. Memory as for
    `scatter_objects`."""
    _check(group)
    activity.count_collective(group)
    if group.rank() != dst:
        _send(obj, dst, group)
        return None
    return [obj if rank == dst else _receive(rank, group) for rank in range(group.size())]


def scatter_objects(objects: Sequence[T] | None, src: int, group: dist.ProcessGroup) -> T:
    """`objects[r]` of group rank `src` on every group rank r; None elsewhere. Collective.

    NumPy arrays inside are not pickled but sent as they are, and those that arrive are views of the one buffer that
    they arrived in: a rank needs the memory of its own object, `src` that of one more at a time. `src` gets its own
    object itself, not a copy.
    """
    _check(group)
    activity.count_collective(group)
    if group.rank() != src:
        return _receive(src, group)
    assert objects is not None and len(objects) == group.size(), "one object for each rank"
    for rank, obj in enumerate(objects):
        if rank != src:
            _send(obj, rank, group)
    return objects[src]


ALIGNMENT = 64  # of each array in the buffer, in bytes


def _send(obj: Any, rank: int, group: dist.ProcessGroup) -> None:
    """Three messages: how many numbers the second has; the bytes of the pickle and of each array; all these bytes."""
    arrays: list[pickle.PickleBuffer] = []
    parts = [memoryview(pickle.dumps(obj, protocol=5, buffer_callback=arrays.append))]
    parts += [array.raw() for array in arrays]
    sizes = [part.nbytes for part in parts]
    dist.send(torch.tensor([len(sizes)]), group=group, group_dst=rank)
    dist.send(torch.tensor(sizes), group=group, group_dst=rank)
    starts = _starts(sizes)
    data = np.empty(starts[-1], dtype=np.uint8)
    for start, part in zip(starts, parts, strict=False):
        data[start : start + part.nbytes] = part
    dist.send(torch.from_numpy(data), group=group, group_dst=rank)


def _receive(rank: int, group: dist.ProcessGroup) -> Any:
    count = torch.empty(1, dtype=torch.int64)
    dist.recv(count, group=group, group_src=rank)
    lengths = torch.empty(int(count), dtype=torch.int64)
    dist.recv(lengths, group=group, group_src=rank)
    sizes = lengths.tolist()
    starts = _starts(sizes)
    data = np.empty(starts[-1], dtype=np.uint8)
    dist.recv(torch.from_numpy(data), group=group, group_src=rank)
    pickled, *arrays = (data[start : start + n].data for start, n in zip(starts, sizes, strict=False))
    return pickle.loads(pickled, buffers=arrays)  # noqa: S301 (from another rank of this job)


def _starts(sizes: Sequence[int]) -> list[int]:
    """Where each part begins, and the end of the last one."""
    padded = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
    return [0, *itertools.accumulate(padded)]


class Told(NamedTuple):
    """An error as other ranks hear of it: whether it is a UserError, and its text."""

    users: bool
    message: str

    @classmethod
    def of(cls, error: Exception) -> Told:
        users = isinstance(error, UserError)
        return cls(users, str(error) if users else f"{type(error).__name__}: {error}")

    def error(self, where: str) -> Exception:
        """To raise on another rank: a UserError as such, any other as a RuntimeError that says `where` it was."""
        return UserError(self.message) if self.users else RuntimeError(f"{where}: {self.message}")


def share_outcome(result: T | None, error: Exception | None, group: dist.ProcessGroup) -> T:
    """Group rank 0's `result`, or its `error`, on every rank. Collective; the other ranks' arguments are not read.

    A UserError is raised as a UserError on every rank, so that all of them handle it alike. Any other error is raised
    unchanged on rank 0, and elsewhere as a RuntimeError that quotes it.
    """
    told = None if error is None else Told.of(error)
    if group.rank() != 0:
        error = None
    result, told = broadcast_object((result, told), 0, group)
    if error is not None:
        raise error
    if told is not None:
        raise told.error("global rank 0 failed")
    return result  # type: ignore[return-value]


def on_rank_zero(action: Callable[[], T], group: dist.ProcessGroup) -> T:
    """Run `action` on group rank 0; return its result, or raise its error (`share_outcome`), on every rank.
    Collective."""
    result: T | None = None
    error: Exception | None = None
    if group.rank() == 0:
        try:
            result = action()
        except Exception as e:
            error = e
    return share_outcome(result, error, group)


def only_rank_zero(action: Callable[[], T], group: dist.ProcessGroup) -> T | None:
    """As `on_rank_zero`, but the result stays on group rank 0; the others get None. Collective."""
    kept: list[T] = []
    on_rank_zero(lambda: kept.append(action()), group)
    return kept[0] if kept else None


def first_message(message: T | None, group: dist.ProcessGroup) -> T | None:
    """The message (text, or another object) of the lowest rank that has one, on every rank; None when none has.
    Collective: one all-reduce of a number, and a broadcast only when there is a message."""
    if group.size() == 1:
        return message
    _check(group)
    activity.count_collective(group)
    first = torch.tensor(group.size() if message is None else group.rank(), dtype=torch.int64)
    dist.all_reduce(first, dist.ReduceOp.MIN, group=group)
    speaker = int(first)
    return None if speaker == group.size() else broadcast_object(message, speaker, group)


def meet(group: dist.ProcessGroup) -> None:
    """Wait until every rank of the group is here. Collective. Before a collective of GPUs that some ranks reach much
    later than others: gloo's time limit, on the host group, is the long one."""
    if group.size() > 1:
        _check(group)
        activity.count_collective(group)
        dist.all_reduce(torch.zeros(()), group=group)


@contextmanager
def objects_over(host: dist.ProcessGroup) -> Iterator[None]:
    """Inside, object collectives of any library take `host`, a group of all ranks, where they name no group: those in
    which Megatron-Core compares parameter groups name none, and would use the world's, NCCL."""
    originals = {name: getattr(dist, name) for name in COLLECTIVES}

    def over_host(original: Callable[..., Any]) -> Callable[..., Any]:
        parameters = inspect.signature(original)

        @functools.wraps(original)
        def collective(*args: Any, **kwargs: Any) -> Any:
            bound = parameters.bind(*args, **kwargs)
            if bound.arguments.get("group") is None:
                bound.arguments["group"] = host
            return original(*bound.args, **bound.kwargs)

        return collective

    for name, original in originals.items():
        setattr(dist, name, over_host(original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def _check(group: dist.ProcessGroup) -> None:
    if dist.get_backend(group) == "nccl":
        raise RuntimeError("Python objects, and long waits, belong on ProcessGroups.host: this group is NCCL's")

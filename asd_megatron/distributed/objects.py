"""Python objects between ranks of one job. They travel by pickle, which is safe here: both ends are this program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from asd_megatron.distributed.device import device
from asd_megatron.errors import UserError

T = TypeVar("T")


def broadcast_object(obj: T | None, src: int, group: dist.ProcessGroup) -> T:
    """`obj` of group rank `src`, on every rank of the group. Collective."""
    box: list[Any] = [obj]
    if group.size() > 1:
        dist.broadcast_object_list(box, group=group, group_src=src)
    return box[0]


def gather_objects(obj: T, dst: int, group: dist.ProcessGroup) -> list[T] | None:
    """Every rank's object, in rank order, on group rank `dst`; None elsewhere. Collective."""
    if group.size() == 1:
        return [obj]
    found: list[Any] | None = [None] * group.size() if group.rank() == dst else None
    dist.gather_object(obj, found, group=group, group_dst=dst)
    return found


def share_outcome(result: T | None, error: Exception | None, group: dist.ProcessGroup) -> T:
    """Group rank 0's `result`, or its `error`, on every rank. Collective; the other ranks' arguments are not read.

    A UserError is raised as a UserError on every rank, so that all of them handle it alike. Any other error is raised
    unchanged on rank 0, and elsewhere as a RuntimeError that quotes it.
    """
    users = isinstance(error, UserError)
    message = None if error is None else str(error) if users else f"{type(error).__name__}: {error}"
    if group.rank() != 0:
        error = None
    result, message, users = broadcast_object((result, message, users), 0, group)
    if error is not None:
        raise error
    if message is not None:
        raise UserError(message) if users else RuntimeError(f"global rank 0 failed: {message}")
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


def first_message(message: str | None, group: dist.ProcessGroup) -> str | None:
    """The message of the lowest rank that has one, on every rank; None when none has. Collective: one all-reduce of a
    number, and a broadcast only when there is a message."""
    if group.size() == 1:
        return message
    mine = group.size() if message is None else group.rank()
    first = torch.tensor(mine, dtype=torch.int64, device=device())
    dist.all_reduce(first, dist.ReduceOp.MIN, group=group)
    speaker = int(first)
    return None if speaker == group.size() else broadcast_object(message, speaker, group)

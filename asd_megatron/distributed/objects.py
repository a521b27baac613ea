"""Python objects between ranks of one job. They travel by pickle, which is safe here: both ends are this program."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist

from asd_megatron.distributed.device import device

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


def first_message(message: str | None, group: dist.ProcessGroup) -> str | None:
    """The message of the lowest rank that has one, on every rank; None when none has. Collective: one number unless
    there is something to say."""
    if group.size() == 1:
        return message
    mine = group.size() if message is None else group.rank()
    first = torch.tensor(mine, dtype=torch.int64, device=device())
    dist.all_reduce(first, dist.ReduceOp.MIN, group=group)
    speaker = int(first)
    return None if speaker == group.size() else broadcast_object(message, speaker, group)

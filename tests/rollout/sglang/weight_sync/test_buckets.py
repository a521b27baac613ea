"""Buckets: every byte once, aligned, of bounded size, two alive at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from asd_megatron.rollout.sglang.weight_sync.buckets import Bucket, pack


def _unpack(bucket: Bucket) -> Iterator[tuple[str, Tensor]]:
    """As a server does."""
    start = 0
    description = bucket.contents.description()
    for name, dtype, shape in zip(*(description[key] for key in ("names", "dtypes", "shapes")), strict=True):
        kind = getattr(torch, dtype)
        assert start % kind.itemsize == 0
        size = kind.itemsize * torch.Size(shape).numel()
        yield name, bucket.data[start : start + size].view(kind).reshape(shape).clone()
        start += size
    assert start == bucket.data.numel()


def test_every_tensor_arrives_once_and_unchanged() -> None:
    torch.manual_seed(0)
    kinds = (torch.float32, torch.bfloat16, torch.float64)
    sent = [(f"t{i}", torch.randn(i % 5 + 1, 3).to(kinds[i % 3])) for i in range(40)]
    sent.append(("columns", torch.randn(6, 9)[:, 2:5]))
    sent.append(("large", torch.randn(500)))
    sent.append(("last", torch.randn(2)))
    found = [item for bucket in pack(sent, 400, torch.device("cpu")) for item in _unpack(bucket)]
    assert sorted(name for name, _ in found) == sorted(name for name, _ in sent)
    for name, tensor in sent:
        assert torch.equal(dict(found)[name], tensor), name


def test_a_bucket_is_bounded_but_for_a_tensor_larger_than_that() -> None:
    sent = [(f"t{i}", torch.zeros(10)) for i in range(7)] + [("large", torch.zeros(1000))] + [("t", torch.zeros(10))]
    sizes = [(len(bucket.contents.names), bucket.data.numel()) for bucket in pack(sent, 100, torch.device("cpu"))]
    assert sizes == [(2, 80), (2, 80), (2, 80), (1, 40), (1, 4000), (1, 40)]


def test_a_bucket_stays_as_it_is_while_the_next_is_filled() -> None:
    sent = [(f"t{i}", torch.full((10,), float(i))) for i in range(6)]
    previous: Bucket | None = None
    memory = set()
    for bucket in pack(sent, 40, torch.device("cpu")):
        if previous is not None:
            ((name, tensor),) = _unpack(previous)
            assert tensor[0] == float(name[1:])
        memory.add(bucket.data.data_ptr())
        previous = bucket
    assert len(memory) == 2


def test_nothing_makes_no_bucket() -> None:
    assert list(pack([], 100)) == []

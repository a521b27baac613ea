"""Exact order statistics of a tensor that is spread over ranks.

Float32 values map to 32-bit integers in the same order; three histograms of 11, 11 and 10 bits, each summed over the
ranks, narrow an order statistic down to its only possible value. The result is exact and the same on every rank, for
any split of the values, empty ranks included, without moving a value: three all-reduces of 2,048 counts per statistic
asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

DIGITS = (11, 11, 10)


def distributed_order_statistics(
    x: Tensor, ranks: Callable[[int], Sequence[int]], group: dist.ProcessGroup | None = None
) -> tuple[list[float], int]:
    """The values at `ranks(n)` (0-based, ascending order) of all ranks' elements, and their number n.

    `x` has any shape, float32 or narrower, on a device that `group` can reduce on; `group` None is this process
    alone. NaN sorts last and -0.0 as 0.0, as in `torch.sort`. With n = 0 the list is empty and `ranks` is not called.
    Collective over `group`.
    """
    if not x.is_floating_point() or x.dtype == torch.float64:
        raise ValueError(f"order statistics are exact for float32 and narrower: x is {x.dtype}")
    keys = _keys(x.detach().reshape(-1).to(torch.float32))
    shift = 32 - DIGITS[0]
    counts = _reduced(torch.bincount(keys >> shift, minlength=1 << DIGITS[0]), group)
    total = int(counts.sum())
    if total == 0:
        return [], 0
    left = torch.tensor(list(ranks(total)), dtype=torch.int64, device=x.device)
    if left.numel() and not 0 <= int(left.min()) <= int(left.max()) < total:
        raise ValueError(f"ranks {left.tolist()} must lie in 0 .. {total - 1}")
    prefix, left = _descend(counts.expand(len(left), -1), left)
    for bits in DIGITS[1:]:
        shift -= bits
        digits, above = (keys >> shift) & ((1 << bits) - 1), keys >> (shift + bits)
        counts = torch.zeros(len(left), 1 << bits, dtype=torch.int64, device=x.device)
        for k, p in enumerate(prefix):
            counts[k] = torch.bincount(digits[above == p], minlength=1 << bits)
        digit, left = _descend(_reduced(counts, group), left)
        prefix = (prefix << bits) | digit
    return _values(prefix).tolist(), total


def lower_median(x: Tensor, group: dist.ProcessGroup | None = None) -> float:
    """The median over all ranks (an even count: the lower of the two middle values); NaN without any element."""
    values, total = distributed_order_statistics(x, lambda n: [(n - 1) // 2], group)
    return values[0] if total else math.nan


def quantiles(x: Tensor, qs: Sequence[float], group: dist.ProcessGroup | None = None) -> list[float]:
    """Quantiles `qs` in [0, 1] over all ranks, interpolated as by `numpy.quantile`; NaN without any element."""
    if not all(0 <= q <= 1 for q in qs):
        raise ValueError(f"quantiles must lie in [0, 1]: {list(qs)}")

    def neighbours(n: int) -> list[int]:
        return [r for q in qs for r in (math.floor(q * (n - 1)), math.ceil(q * (n - 1)))]

    values, total = distributed_order_statistics(x, neighbours, group)
    if not total:
        return [math.nan] * len(qs)
    out = []
    for q, low, high in zip(qs, values[::2], values[1::2], strict=True):
        fraction = q * (total - 1) - math.floor(q * (total - 1))
        # Equal neighbours need no arithmetic, which infinities would not survive.
        out.append(low if low == high or fraction == 0 else low + (high - low) * fraction)
    return out


def _keys(x: Tensor) -> Tensor:
    """Order-preserving int64 keys in [0, 2^32) of float32 values."""
    x = torch.where(x.isnan(), math.nan, x + 0.0)  # one NaN, one zero
    bits = x.contiguous().view(torch.int32).to(torch.int64)
    return torch.where(bits < 0, ~bits & 0xFFFFFFFF, bits | 0x80000000)


def _values(keys: Tensor) -> Tensor:
    bits = torch.where(keys >= 0x80000000, keys & 0x7FFFFFFF, ~keys & 0xFFFFFFFF)
    return torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32).view(torch.float32)


def _reduced(counts: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if group is not None and group.size() > 1:
        dist.all_reduce(counts, group=group)
    return counts


def _descend(counts: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
    """Per row of `counts` [K, bins]: the bin that holds element `left` [K], and that element's rank inside the bin."""
    upto = counts.cumsum(1)
    digit = (upto <= left[:, None]).sum(1)
    before = (upto - counts).gather(1, digit[:, None])[:, 0]
    return digit, left - before

"""Exact order statistics (medians, quantiles) of a tensor that is distributed over ranks.

A radix selection: float32 values map to 32-bit integer keys in the same order, and three histograms over the keys'
first 11, next 11 and last 10 bits, each summed over the ranks, determine the key of the wanted rank digit by digit. No
value moves: the cost is three all-reduces of 2,048 counts for each statistic. The result is exact and the same on every
rank, for any distribution of the values, empty ranks included.

The median (rank 3 of 0 to 6) of seven keys, with two decimal digits instead of three binary ones:

    keys on rank 0: 12 35 38    on rank 1: 11 31 77 36     sorted: 11 12 31 35 36 38 77
    first digit     0 1 2 3 4 5 6 7                        counts 0 2 0 4 0 0 0 1 over both ranks; 2 are below digit 3
                                                           and 6 up to it, so the digit is 3, rank 3 - 2 = 1 inside it
    second digit    of 35 38 31 36 alone                   counts at 1, 5, 6, 8: 1 each; rank 1 is digit 5, the key 35
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

DIGITS = (11, 11, 10)  # bits of a key's digits, most significant first


def distributed_order_statistics(
    x: Tensor, ranks: Callable[[int], Sequence[int]], group: dist.ProcessGroup | None = None
) -> tuple[list[float], int]:
    """The values at the 0-based positions `ranks(n)` of all processes' elements in ascending order, and their number n.

    `x` has any shape, float32 or narrower, on a device that `group` can reduce on; `group` None is this process
    alone. NaN sorts last and -0.0 as 0.0, as in `torch.sort`. With n = 0 the list is empty and `ranks` is not called.
    Collective over `group`. Raises ValueError for other dtypes and for positions outside 0 .. n - 1.
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
    """The median over all processes, the lower of the two middle values for an even count; NaN without any element.
    Collective over `group`."""
    values, total = distributed_order_statistics(x, lambda n: [(n - 1) // 2], group)
    return values[0] if total else math.nan


def quantiles(x: Tensor, qs: Sequence[float], group: dist.ProcessGroup | None = None) -> list[float]:
    """Quantiles `qs` in [0, 1] over all processes, interpolated linearly as by `numpy.quantile`; NaN without any
    element. Collective over `group`."""
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
        # Equal neighbours are not interpolated: infinities would give NaN.
        out.append(low if low == high or fraction == 0 else low + (high - low) * fraction)
    return out


def _keys(x: Tensor) -> Tensor:
    """Order-preserving int64 keys in [0, 2^32) of float32 values.

    The bits of a positive float order like the number itself and get the top bit; those of a negative one order the
    other way round and are inverted: -2.0 -> 0x3FFFFFFF, -0.0 and 0.0 -> 0x80000000, 1.0 -> 0xBF800000.
    """
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
    """One digit of every wanted key: from histograms `counts` [K, bins] and positions `left` [K], the bin that holds
    the position and the position inside that bin, int64 [K] each."""
    upto = counts.cumsum(1)
    digit = (upto <= left[:, None]).sum(1)
    before = (upto - counts).gather(1, digit[:, None])[:, 0]
    return digit, left - before

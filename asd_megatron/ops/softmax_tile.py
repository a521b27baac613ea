"""Softmax statistics and logit gradients of a tile [n, v] of logits, by PyTorch operators.

`triton_tile.py` has the same functions as CUDA kernels; `tile_kernels.py` chooses. Both functions process the tile in
slabs of rows, so that every pass over a slab but the first finds it in the processor's cache, and the scratch memory
is one or two slabs:

    tile [n, v]    slab 0: rows 0 .. step        exp, sum, multiply, ... on these rows before the next slab
                   slab 1: rows step .. 2 step
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from asd_megatron.ops.vocab_shard import merge_softmax

LOG2_E = math.log2(math.e)


class Softmax(NamedTuple):
    """Each row's softmax [n] over the complete vocabulary, equal on all ranks.

    `maximum` is the largest logit and `top_logprob` its log-prob: of any logit z, log p = (z - maximum) + top_logprob.
    `logprob` is the target's. `entropy` in nats.
    """

    maximum: Tensor
    top_logprob: Tensor
    logprob: Tensor
    entropy: Tensor


class Targets(NamedTuple):
    """Each row's target: the column `local` int64 [n] of this tile where `owned` bool [n] is True; elsewhere another
    rank has it, and `local` is any valid column."""

    local: Tensor
    owned: Tensor


def merged(parts: Tensor) -> Softmax:
    """The softmax over the complete vocabulary from the statistics of all its parts [parts, 4, n]."""
    top, total, moment = merge_softmax(parts[:, 0], parts[:, 1], parts[:, 2])
    log_total = total.log()
    return Softmax(top, -log_total, parts[:, 3].amax(0) - top - log_total, log_total - moment / total)


def softmax_statistics(tile: Tensor, target: Targets) -> Tensor:
    """(maximum, total, moment, target's logit) [4, n] over the columns.

    total = sum(e^(z - maximum)) and moment = sum(e^(z - maximum) (z - maximum)), as `merge_softmax` takes them. The
    target's logit is -inf where the tile does not have it. A tile without columns has maximum and target's logit -inf.
    """
    n, v = tile.shape
    out = torch.zeros(4, n, dtype=tile.dtype, device=tile.device)
    if v == 0:
        out[0] = out[3] = -torch.inf
        return out
    out[3] = target_logits(tile, target)
    for rows, (slab,), (shifted, weights) in slabs(tile, scratch=2):
        maximum, total, moment = out[:3, rows]
        torch.amax(slab, 1, out=maximum)
        torch.sub(slab, maximum[:, None], out=shifted)
        exp(shifted, weights)
        torch.sum(weights, 1, out=total)
        torch.sum(weights.mul_(shifted), 1, out=moment)  # no matrix product: those may be TF32
    return out


def logit_gradient_(
    tile: Tensor, target: Targets, softmax: Softmax, g_logprob: Tensor, g_entropy: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The gradient in z [n, v], in `dtype`, of g_logprob * log p(target) + g_entropy * entropy, summed over rows.

    Overwrites `tile`. `g_logprob` [n]; `g_entropy` [n] or None, which is 0.
    """
    for rows, (slab,), (scratch,) in slabs(tile):
        logp = slab.sub_(softmax.maximum[rows, None]).add_(softmax.top_logprob[rows, None])
        p = exp(logp, scratch)
        if g_entropy is None:
            torch.mul(p, -g_logprob[rows, None], out=slab)
        else:
            logp.add_(softmax.entropy[rows, None]).mul_(-g_entropy[rows, None]).sub_(g_logprob[rows, None]).mul_(p)
    add_target_(tile, target, g_logprob)
    return tile.to(dtype)


def target_logits(tile: Tensor, target: Targets) -> Tensor:
    """Each row's logit of its target [n], -inf where the tile does not have it."""
    return torch.where(target.owned, tile.gather(1, target.local[:, None])[:, 0], -torch.inf)


def row_dots(a: Tensor, b: Tensor) -> Tensor:
    """sum_v a[i, row, v] b[j, row, v] of a [k, n, v] and b [l, n, v], rows contiguous: in segments of the rows, as
    `add_segments` takes them. Inside `exact_products`.

    On CPUs by a batched product: it reads both once, where a product and a sum for each of the k * l results take as
    many passes over one more tensor. Sums of segments have less rounding than a row's. v = 32,768, k = l = 2:

        a [2, n, 32768] -> [16 n, 2, 2048]    b -> [16 n, 2048, 2]    found [16 n, 2, 2]
    """
    if a.is_cuda:  # where products may be TF32
        return (a[:, None] * b[None]).sum(3).permute(2, 0, 1)
    segment = _segment(a.shape[2])
    x, y = a.view(len(a), -1, segment), b.view(len(b), -1, segment)
    return torch.bmm(x.transpose(0, 1), y.permute(1, 2, 0))


def add_segments(found: Sequence[Tensor], n: int) -> Tensor:
    """[k, l, n] from what `row_dots` found for consecutive slabs of n rows."""
    return torch.cat(list(found)).unflatten(0, (n, -1)).sum(1).permute(1, 2, 0)


@cache
def _segment(v: int) -> int:
    """The longest segment up to 2,048 columns that divides v equally; v itself if only short ones do."""
    length = next((length for length in range(min(v, 2048), 0, -1) if v % length == 0), v)
    return length if length >= 256 else v


def add_target_(tile: Tensor, target: Targets, values: Tensor) -> None:
    """Add `values` [n] at each row's target where this tile has it."""
    if tile.shape[1]:
        row = torch.arange(tile.shape[0], device=tile.device)
        tile[row, target.local] += torch.where(target.owned, values, 0.0)


def slab_rows(tile: Tensor, arrays: int = 2) -> Iterator[slice]:
    """The rows of consecutive slabs of `arrays` tensors of the tile's shape, which share the cache."""
    n = tile.shape[0]
    step = slab_step(tile, arrays)
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


def slab_step(tile: Tensor, arrays: int) -> int:
    """Rows of a slab of `arrays` tensors of the tile's width."""
    return max(1, 2 * _slab_elements(tile) // max(2, arrays) // max(1, tile.shape[1]))


def slabs(*tiles: Tensor, scratch: int = 1) -> Iterator[tuple[slice, list[Tensor], list[Tensor]]]:
    """(rows, each tile's part, `scratch` tensors of the same shape) for consecutive slabs of tiles of one shape."""
    memory: list[Tensor] = []
    for rows in slab_rows(tiles[0], len(tiles) + scratch):
        parts = [tile[rows] for tile in tiles]
        memory = memory or [torch.empty_like(parts[0]) for _ in range(scratch)]
        yield rows, parts, [m[: len(parts[0])] for m in memory]


def _slab_elements(tile: Tensor) -> int:
    """64 MiB of float32 on a GPU, so that a kernel outweighs its launch; half a MiB for each thread elsewhere."""
    return 1 << 24 if tile.is_cuda else torch.get_num_threads() << 17


def exp(x: Tensor, out: Tensor) -> Tensor:
    """exp(x) to the rounding of x, by exp2. On CPUs torch.exp is MKL's, which is slow on AMD and far slower where the
    result underflows; but exp2 computes the last elements of a tensor, those that fill no vector register, in another
    way, so that deterministic runs take MKL's: a token's log-prob then does not depend on its row."""
    if torch.are_deterministic_algorithms_enabled() and not x.is_cuda:
        return torch.exp(x, out=out)
    return torch.mul(x, LOG2_E, out=out).exp2_()

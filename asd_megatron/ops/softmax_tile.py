"""Softmax statistics and logit gradients of a tile [n, v] of logits, in place.

Both process the tile in slabs of rows, so that every pass over a slab but the first finds it in the processor's cache,
and the scratch memory is one slab:

    tile [n, v]    slab 0: rows 0 .. step        exp, sum, multiply, ... on these rows before the next slab
                   slab 1: rows step .. 2 step
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

LOG2_E = math.log2(math.e)


def softmax_statistics(tile: Tensor, local: Tensor, owned: Tensor) -> Tensor:
    """(maximum, total, moment, target's logit) [4, n] over the columns; `tile` becomes z - maximum.

    total = sum(e^(z - maximum)) and moment = sum(e^(z - maximum) (z - maximum)), as `merge_softmax` takes them.
    `local` int64 [n] is the target's column where `owned` bool [n] is True; elsewhere the target's logit is -inf. A
    tile without columns has maximum and target's logit -inf.
    """
    n, v = tile.shape
    out = torch.zeros(4, n, dtype=tile.dtype, device=tile.device)
    if v == 0:
        out[0] = out[3] = -torch.inf
        return out
    out[3] = torch.where(owned, tile.gather(1, local[:, None])[:, 0], -torch.inf)
    for rows, (slab,), (scratch,) in slabs(tile):
        maximum, total, moment = out[:3, rows]
        torch.amax(slab, 1, out=maximum)
        slab.sub_(maximum[:, None])
        weights = exp(slab, scratch)
        torch.sum(weights, 1, out=total)
        torch.sum(weights.mul_(slab), 1, out=moment)  # no matrix product: those may be TF32
    return out


def logit_gradient_(
    tile: Tensor,
    local: Tensor,
    owned: Tensor,
    offset: Tensor,
    entropy: Tensor,
    g_logprob: Tensor,
    g_entropy: Tensor | None,
) -> Tensor:
    """Turn `tile` into the gradient in z [n, v] of g_logprob * log p(target) + g_entropy * entropy, summed over rows.

    `tile` is z plus any per-row constant; adding `offset` [n] makes it log p. `entropy` [n] is that of the complete
    vocabulary.
    """
    for rows, (slab,), (scratch,) in slabs(tile):
        logp = slab.add_(offset[rows, None])
        p = exp(logp, scratch)
        if g_entropy is None:
            torch.mul(p, -g_logprob[rows, None], out=slab)
        else:
            logp.add_(entropy[rows, None]).mul_(-g_entropy[rows, None]).sub_(g_logprob[rows, None]).mul_(p)
    add_target_(tile, local, owned, g_logprob)
    return tile


def add_target_(tile: Tensor, local: Tensor, owned: Tensor, values: Tensor) -> None:
    """Add `values` [n] at each row's target where this rank owns it."""
    if tile.shape[1]:
        row = torch.arange(tile.shape[0], device=tile.device)
        tile[row, local] += torch.where(owned, values, 0.0)


def slab_rows(tile: Tensor, arrays: int = 2) -> Iterator[slice]:
    """The rows of consecutive slabs of `arrays` tensors of the tile's shape, which share the cache."""
    n, v = tile.shape
    step = max(1, 2 * _slab_elements(tile) // max(2, arrays) // max(1, v))
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


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
    result underflows."""
    return torch.mul(x, LOG2_E, out=out).exp2_()

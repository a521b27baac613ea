"""What every form of the fused head does to a tile of logits: products, statistics over the vocabulary's ranks, and the
accumulation of both gradients. See `vocab_head.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from asd_megatron.ops.gemm import accumulation_dtype, add_product_, gradient_dtype, operand, product, rounded_product
from asd_megatron.ops.main_grad import WeightGradient
from asd_megatron.ops.softmax_tile import Softmax, Targets, merged
from asd_megatron.ops.tile_kernels import tile_kernels
from asd_megatron.ops.vocab_shard import VocabShard

TokenLoss = Callable[[Tensor, Tensor, slice], Tensor]
"""(logprobs [n], entropy [n], block) -> the block's part of the loss, a scalar. `block`: which slice of the N rows."""


def checked(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    shard: VocabShard,
    rows: Tensor | None,
    temperature: float,
    token_block: int | None,
) -> tuple[Tensor | None, int]:
    """(rows, rows of a tile). Raises ValueError for shapes and values that the fused head does not take."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden must be [T, H] and weight [rows, H] of one dtype: they are {hidden.dtype} {tuple(hidden.shape)} "
            f"and {weight.dtype} {tuple(weight.shape)}"
        )
    tokens = hidden.shape[0] * (shard.world if shard.sequence_parallel else 1)
    wanted = tokens if rows is None else rows.shape[0]
    if target.shape != (wanted,):
        raise ValueError(f"target has shape {tuple(target.shape)}, but {wanted} tokens are selected")
    if shard.rows > weight.shape[0]:
        raise ValueError(f"the shard has {shard.rows} valid rows, the weight only {weight.shape[0]}")
    if not temperature > 0:
        raise ValueError(f"the temperature must be positive: it is {temperature}")
    if token_block is not None and token_block < 1:
        raise ValueError(f"token_block must be at least 1: it is {token_block}")
    return rows, token_block or default_block(weight)


def default_block(weight: Tensor) -> int:
    """Rows of a tile for a head's `weight`. Equal on all ranks, because their weights have equally many rows."""
    return tile_rows(weight.shape[0], on_gpu=weight.is_cuda)


def tile_rows(vocabulary: int, *, on_gpu: bool) -> int:
    """Rows of a tile: 512 MiB of float32 on a GPU, 32 MiB elsewhere, but at least 256, below which packing the weight
    for each tile's products takes noticeable time. vocabulary: rows of the weight."""
    elements = 1 << 27 if on_gpu else 1 << 23
    return max(256, elements // max(vocabulary, 1) // 64 * 64)


def default_pair_block(weight: Tensor, shard: VocabShard) -> int:
    """Rows of a tile with the logits of student and teacher.

    Its buffer has a third more rows than `default_block`, or a sixth if the tile is divided (`PairTiles`): 299 rows for
    tiles of 224. Of the next smaller tiles that equal lengths lead to, most have over 192 rows; below, MKL needs 1.6
    times as long for a row of the gradient's product with the weight (measured on an Intel CPU).
    """
    return default_block(weight) * 7 // 8 if divisible(weight, shard) else default_block(weight) * 2 // 3


def divisible(weight: Tensor, shard: VocabShard) -> bool:
    """Whether parts of a pair tile can be processed one after the other: they need no collectives, and a part's
    gradient stays in its logits' place."""
    return shard.world == 1 and gradient_dtype(operand(weight[:0])) == accumulation_dtype(weight.dtype)


class Tiles:
    """The logits of one call, one tile at a time in the same buffer."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        rows: Tensor | None,
        shard: VocabShard,
        temperature: float,
        block: int,
    ) -> None:
        self.gathered = shard.gather_tokens(hidden)  # [T, H]
        self.weight = operand(weight[: shard.rows])  # [v, H]
        self.rows = rows
        self.shard = shard
        self.temperature = temperature
        self.count = target.shape[0]
        self.tiles = -(-self.count // block)
        local = target - shard.start
        self.owned = (local >= 0) & (local < shard.rows)
        self.local = local.clamp(0, max(shard.rows - 1, 0))
        self.dtype = accumulation_dtype(hidden.dtype)
        self.gradient_dtype = gradient_dtype(self.weight)
        longest = -(-self.count // max(self.tiles, 1))
        self.buffer = torch.empty((self.rows_of(longest), shard.rows), dtype=self.dtype, device=hidden.device)
        self.kernels = tile_kernels(self.buffer)

    def rows_of(self, tile: int) -> int:
        """Rows of the buffer for a tile of so many rows."""
        return tile

    def blocks(self) -> Iterator[slice]:
        """The tiles' slices of the N rows: as few as fit, of nearly equal length, because a tile of a few rows costs
        almost as much as a full one."""
        for tile in range(self.tiles):
            yield slice(tile * self.count // self.tiles, (tile + 1) * self.count // self.tiles)

    def hidden(self, block: slice) -> Tensor:
        return operand(self.gathered[block] if self.rows is None else self.gathered[self.rows[block]])

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits divided by the temperature [n, v], in the accumulation dtype. The next call overwrites them."""
        tile = self.buffer[: hidden.shape[0]]
        product(tile, hidden, self.weight)
        return tile if self.temperature == 1.0 else tile.mul_(1.0 / self.temperature)

    def targets(self, block: slice) -> Targets:
        return Targets(self.local[block], self.owned[block])

    def statistics(self, tile: Tensor, block: slice) -> Tensor:
        """(maximum, total, moment, target's logit) [4, n] of this rank's vocabulary."""
        return self.kernels.softmax_statistics(tile, self.targets(block))

    def reduce(self, statistics: Tensor) -> Softmax:
        """Every rank's statistics [4, n], merged. One collective."""
        return merged(self.shard.gather_ranks(statistics))

    def logit_gradient(
        self, tile: Tensor, softmax: Softmax, g_logprob: Tensor, g_entropy: Tensor | None, block: slice
    ) -> Tensor:
        """d loss / d (hidden @ weight.T) [n, v] in `gradient_dtype`. Overwrites `tile`."""
        g_logprob, g_entropy = self.scaled(g_logprob, g_entropy)
        return self.kernels.logit_gradient_(
            tile, self.targets(block), softmax, g_logprob, g_entropy, self.gradient_dtype
        )

    def scaled(self, g_logprob: Tensor, g_entropy: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Derivatives in log-prob and entropy, for gradients in hidden @ weight.T instead of z."""
        return g_logprob / self.temperature, None if g_entropy is None else g_entropy / self.temperature


class PairTiles(Tiles):
    """Tiles with the logits of student and teacher, whose gradient is the student's.

    The teacher's logits are in the way of larger products. Where nothing forbids it (`divisible`), a tile is therefore
    processed in two parts, and the gradient's two products, which suffer most from few rows, are done for both at once:

        rows of the buffer    0 ............ 137 ........ 205 ........ 274
        first part            student        | teacher                 |
        its gradient is done  gradient       | free                    |
        second part           gradient       | student    | teacher    |
        both are done         gradient of 205 rows        | free       |
    """

    @property
    def divided(self) -> bool:
        return divisible(self.weight, self.shard)

    def rows_of(self, tile: int) -> int:
        return 2 * (self._first(tile) if self.divided else tile)

    def _first(self, tile: int) -> int:
        """Rows of the first part: two thirds, so that twice the second part fits beside it in the rows of the pair."""
        return -(-2 * tile // 3)

    def parts(self, block: slice) -> list[slice]:
        """The parts of a tile, as slices of the N rows."""
        middle = block.start + self._first(block.stop - block.start)
        if not self.divided or middle == block.stop:
            return [block]
        return [slice(block.start, middle), slice(middle, block.stop)]

    def pair(self, hidden: Tensor, teacher: Tensor, teacher_weight: Tensor | None, at: int) -> Tensor:
        """The student's and the teacher's logits [2, n, v], as `logits`, in the buffer from row `at` on;
        `teacher_weight` None: both of the same weight, in one product."""
        n = hidden.shape[0]
        if teacher.shape != hidden.shape or teacher.dtype != hidden.dtype:
            raise ValueError(
                f"the teacher's hidden states must be {hidden.dtype} {tuple(hidden.shape)} like the student's: they "
                f"are {teacher.dtype} {tuple(teacher.shape)}"
            )
        tiles = self.buffer[at : at + 2 * n]
        if teacher_weight is None:
            product(tiles, torch.cat([hidden, teacher]), self.weight)
        else:
            product(tiles[:n], hidden, self.weight)
            product(tiles[n:], teacher, teacher_weight)
        if self.temperature != 1.0:
            tiles.mul_(1.0 / self.temperature)
        return tiles.unflatten(0, (2, n))

    def gradient(self, last: Tensor, block: slice) -> Tensor:
        """The complete tile's [n, v], when `last` is its last part's."""
        return self.buffer[: block.stop - block.start] if self.divided else last


class Gradients:
    """The two gradients of one call, filled tile by tile."""

    def __init__(self, tiles: Tiles, hidden: Tensor, weight: Tensor, for_hidden: bool, for_weight: bool) -> None:
        self.tiles = tiles
        self.local = hidden.new_empty((tiles.count, hidden.shape[1])) if for_hidden else None
        self.weight = WeightGradient(weight, tiles.dtype) if for_weight else None

    def add(self, gradient: Tensor, hidden: Tensor, block: slice) -> None:
        """`gradient` [n, v], in `Tiles.gradient_dtype`, of the logits of `hidden` [n, H]."""
        if self.local is not None:
            rounded_product(self.local[block], gradient, self.tiles.weight)
        if self.weight is not None and self.tiles.shard.rows:
            add_product_(self.weight.buffer[: self.tiles.shard.rows], gradient, hidden)

    def hidden(self) -> Tensor | None:
        """[T_local, H], summed over the vocabulary's ranks. Collective; call once."""
        if self.local is None:
            return None
        tiles = self.tiles
        return tiles.shard.reduce_hidden_gradient(self.local, tiles.rows, tiles.gathered.shape[0])

    def finish(self) -> tuple[Tensor | None, WeightGradient | None]:
        """(gradient of the hidden states as `hidden`, the weight's, in `main_grad` if there is one). Call once."""
        d_hidden = self.hidden()
        if self.weight is not None:
            self.weight.flush()
        return d_hidden, self.weight


def backward(ctx: Any, g_loss: Tensor, name: str) -> tuple[Tensor | None, Tensor | None]:
    """(d hidden, d weight) of an op `name` whose gradients were complete in forward: `ctx.d_hidden`,
    `ctx.weight_gradient` of `Gradients.finish`."""
    d_hidden, weight_gradient = ctx.d_hidden, ctx.weight_gradient
    del ctx.d_hidden, ctx.weight_gradient
    scale = float(g_loss)
    d_weight = None
    if weight_gradient is not None:
        if weight_gradient.in_main_grad and scale != 1.0:
            raise RuntimeError(
                f"{name} has already added to main_grad, but backward scales its loss by {scale}: scale "
                "inside token_loss (Megatron: calculate_per_token_loss, a three-tuple loss, no grad_scale_func)"
            )
        d_weight = weight_gradient.result()
        if d_weight is not None and not weight_gradient.in_main_grad and scale != 1.0:
            d_weight.mul_(scale)
    if d_hidden is not None and scale != 1.0:
        d_hidden.mul_(scale)
    return d_hidden, d_weight


def differentiated(
    token_loss: TokenLoss, logprobs: Tensor, entropy: Tensor, block: slice, differentiate: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The block's loss and its derivatives in log-prob [n] and entropy [n] (None: the loss does not depend on it)."""
    logprobs, entropy = logprobs.detach().clone(), entropy.detach().clone()
    zero = torch.zeros_like(logprobs)
    if not differentiate:
        return token_loss(logprobs, entropy, block).detach(), zero, None
    with torch.enable_grad():
        logprobs.requires_grad_()
        entropy.requires_grad_()
        part = token_loss(logprobs, entropy, block)
        if not part.requires_grad:  # of tokens without weight the loss may be a constant
            return part.detach(), zero, None
        g_logprobs, g_entropy = torch.autograd.grad(part, (logprobs, entropy), allow_unused=True)
    return part.detach(), zero if g_logprobs is None else g_logprobs, g_entropy

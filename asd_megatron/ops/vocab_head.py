"""Fused linear cross-entropy: the LM head with log-probabilities and full-vocabulary entropies, without the logits.

The head is sharded over the vocabulary on a tensor-parallel group. Logits exist one tile at a time, [rows of a tile,
local vocabulary], in float32; log-probs and entropies (nats) are exact over the valid vocabulary. Two forms:

* `linear_logprob` is an ordinary differentiable function that recomputes every tile in backward: 8 N H V flops, and one
  collective in each direction (plus those of sequence parallelism).
* `linear_token_loss` takes the loss as a callback, so that a tile gives log-probs, loss and gradient at once: 6 N H V
  flops, one small collective for each tile. The gradient is complete when forward returns.

Both loop over tiles of the N rows. With tensor parallelism 2 and three tiles:

                    rank 0         rank 1
    rows of tile 0  z [n, V / 2]   z [n, V / 2]
    rows of tile 1  z [n, V / 2]   z [n, V / 2]
    rows of tile 2  z [n, V / 2]   z [n, V / 2]

    1. z = hidden[rows] @ weight.T / temperature, on each rank for its columns of the vocabulary
    2. each rank: max, sum exp, sum z exp and the target's logit of its columns, [4, n]
    3. all-gather of [4, n], merged: logsumexp, log-prob and entropy of the complete vocabulary
    4. d loss / d z in the tile's memory, then two products with it: d hidden[rows] and an addition to d weight

`linear_token_loss` does 1 to 4 for each tile; `linear_logprob` does 1 and 2 for each tile, 3 once, and in backward 1
and 4 for each tile.

With log p = z - logsumexp(z) and H = -sum(p log p), both at the temperature:

    d log p_y / d z_v = [v = y] - p_v          d H / d z_v = -p_v (log p_v + H)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from asd_megatron.ops import softmax_tile
from asd_megatron.ops.gemm import accumulation_dtype, add_product_, gradient_operand, operand, product, rounded_product
from asd_megatron.ops.main_grad import WeightGradient
from asd_megatron.ops.vocab_shard import VocabShard, merge_softmax

__all__ = ["TokenLoss", "VocabShard", "linear_logprob", "linear_token_loss"]

TokenLoss = Callable[[Tensor, Tensor, slice], Tensor]
"""(logprobs [n], entropy [n], block) -> the block's part of the loss, a scalar. `block`: which slice of the N rows."""


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    shard: VocabShard,
    *,
    rows: Tensor | None = None,
    temperature: float = 1.0,
    token_block: int | None = None,
) -> tuple[Tensor, Tensor]:
    """log p(target) and full-vocabulary entropy from hidden states, both differentiable.

    `hidden` [T_local, H] and `weight` [padded rows, H] share a dtype; `target` int64 [N] holds global token ids;
    `rows` int64 [N] selects tokens of the complete, sequence-gathered token dimension (None: all, N = T).
    `token_block` bounds a tile's rows (None: by memory). Returns float32 [N] twice, equal on every rank. A target
    outside the vocabulary gives -inf. Raises ValueError for shapes or values outside these.

    Collective over `shard.group`, forward and backward: N, target and rows are the same on all its ranks; N may be 0.
    Upstream gradients must be equal on all ranks. The weight's gradient is added to `weight.main_grad` if that exists,
    see `main_grad.py`.
    """
    rows, block = _checked(hidden, weight, target, shard, rows, temperature, token_block)
    return _LinearLogprob.apply(hidden, weight, target, rows, shard, temperature, block)


def linear_token_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    token_loss: TokenLoss,
    shard: VocabShard,
    *,
    rows: Tensor | None = None,
    temperature: float = 1.0,
    token_block: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A sum of per-token losses that are functions of log p(target) and entropy, with its gradient.

    Returns (loss scalar, logprobs [N], entropy [N]), float32, the last two detached.

    `token_loss(logprobs [n], entropy [n], block)` is called for consecutive blocks under autograd and returns the
    block's part of the loss; it must be deterministic, and a token's loss may depend on that token alone. Arguments as
    in `linear_logprob`.

    With `weight.main_grad`, its gradient is added there *in forward*, and backward requires an upstream gradient of
    exactly 1 (scale inside `token_loss`): RuntimeError otherwise. Under `torch.no_grad` nothing is differentiated and
    `main_grad` is left alone.
    """
    rows, block = _checked(hidden, weight, target, shard, rows, temperature, token_block)
    differentiate = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _LinearTokenLoss.apply(hidden, weight, target, rows, token_loss, shard, temperature, block, differentiate)


def _checked(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    shard: VocabShard,
    rows: Tensor | None,
    temperature: float,
    token_block: int | None,
) -> tuple[Tensor | None, int]:
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
    return rows, token_block or _default_block(weight)


def _default_block(weight: Tensor) -> int:
    """Rows of a tile: 512 MiB of float32 on a GPU, 32 MiB elsewhere, but at least 256, below which packing the weight
    for each tile's products takes noticeable time. Equal on all ranks, because their weights have equally many rows."""
    elements = 1 << 27 if weight.is_cuda else 1 << 23
    return max(256, elements // max(weight.shape[0], 1) // 64 * 64)


class _Tiles:
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
        self.owned = (local >= 0) & (local < shard.rows)  # bool [N]: the target's column is on this rank
        self.local = local.clamp(0, max(shard.rows - 1, 0))
        self.dtype = accumulation_dtype(hidden.dtype)
        longest = -(-self.count // max(self.tiles, 1))
        self.buffer = torch.empty((longest, shard.rows), dtype=self.dtype, device=hidden.device)

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

    def statistics(self, tile: Tensor, block: slice) -> Tensor:
        """(maximum, total, moment, target's logit) [4, n] of this rank's vocabulary; `tile` becomes z - maximum."""
        return softmax_tile.softmax_statistics(tile, self.local[block], self.owned[block])

    def reduce(self, statistics: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Every rank's statistics [4, n] merged into (logsumexp, log-prob of the target, entropy), each [n]. One
        collective."""
        parts = self.shard.gather_ranks(statistics)
        top, total, moment = merge_softmax(parts[:, 0], parts[:, 1], parts[:, 2])
        log_total = total.log()
        return top + log_total, parts[:, 3].amax(0) - top - log_total, log_total - moment / total

    def logit_gradient(
        self, tile: Tensor, offset: Tensor, entropy: Tensor, g_logprob: Tensor, g_entropy: Tensor | None, block: slice
    ) -> Tensor:
        """d loss / d (hidden @ weight.T) [n, v].

        `tile` is z plus any per-row constant; adding `offset` [n] makes it log p. Overwrites `tile`.
        """
        g_logprob = g_logprob / self.temperature
        g_entropy = None if g_entropy is None else g_entropy / self.temperature
        return softmax_tile.logit_gradient_(
            tile, self.local[block], self.owned[block], offset, entropy, g_logprob, g_entropy
        )


class _Gradients:
    """The two gradients of one call, filled tile by tile."""

    def __init__(self, tiles: _Tiles, hidden: Tensor, weight: Tensor, for_hidden: bool, for_weight: bool) -> None:
        self.tiles = tiles
        self.local = hidden.new_empty((tiles.count, hidden.shape[1])) if for_hidden else None
        self.weight = WeightGradient(weight, tiles.dtype) if for_weight else None

    def add(self, gradient: Tensor, hidden: Tensor, block: slice) -> None:
        """`gradient` [n, v] of the logits of `hidden` [n, H]."""
        gradient = gradient_operand(gradient, hidden)
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


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        rows: Tensor | None,
        shard: VocabShard,
        temperature: float,
        block: int,
    ) -> tuple[Tensor, Tensor]:
        tiles = _Tiles(hidden, weight, target, rows, shard, temperature, block)
        statistics = torch.empty(4, tiles.count, dtype=tiles.dtype, device=hidden.device)
        for b in tiles.blocks():
            statistics[:, b] = tiles.statistics(tiles.logits(tiles.hidden(b)), b)
        lse, logprobs, entropy = tiles.reduce(statistics)
        ctx.save_for_backward(hidden, weight, target, rows, lse, entropy)
        ctx.weight = weight  # the parameter itself: it carries Megatron's attributes
        ctx.settings = (shard, temperature, block)
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_logprobs: Tensor | None, g_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, target, rows, lse, entropy = ctx.saved_tensors
        tiles = _Tiles(hidden, weight, target, rows, *ctx.settings)
        gradients = _Gradients(tiles, hidden, ctx.weight, *ctx.needs_input_grad[:2])
        g_logprobs = torch.zeros_like(lse) if g_logprobs is None else g_logprobs
        for b in tiles.blocks():
            h = tiles.hidden(b)
            g_h = None if g_entropy is None else g_entropy[b]
            gradients.add(tiles.logit_gradient(tiles.logits(h), -lse[b], entropy[b], g_logprobs[b], g_h, b), h, b)
        d_weight = None
        if gradients.weight is not None:
            gradients.weight.flush()
            d_weight = gradients.weight.result()
        return gradients.hidden(), d_weight, None, None, None, None, None


class _LinearTokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        rows: Tensor | None,
        token_loss: TokenLoss,
        shard: VocabShard,
        temperature: float,
        block: int,
        differentiate: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tiles = _Tiles(hidden, weight, target, rows, shard, temperature, block)
        needed = ctx.needs_input_grad[:2] if differentiate else (False, False)
        gradients = _Gradients(tiles, hidden, weight, *needed)
        loss = torch.zeros((), dtype=tiles.dtype, device=hidden.device)
        logprobs, entropy = torch.empty(2, tiles.count, dtype=tiles.dtype, device=hidden.device)
        for b in tiles.blocks():
            h = tiles.hidden(b)
            tile = tiles.logits(h)
            statistics = tiles.statistics(tile, b)
            lse, logprobs[b], entropy[b] = tiles.reduce(statistics)
            part, g_logprobs, g_entropy = _differentiated(token_loss, logprobs[b], entropy[b], b, differentiate)
            loss += part
            if differentiate:
                offset = statistics[0] - lse
                gradients.add(tiles.logit_gradient(tile, offset, entropy[b], g_logprobs, g_entropy, b), h, b)
        ctx.d_hidden, ctx.weight_gradient = gradients.hidden(), gradients.weight
        if gradients.weight is not None:
            gradients.weight.flush()
        ctx.mark_non_differentiable(logprobs, entropy)
        return loss, logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_loss: Tensor, _g_logprobs: Tensor, _g_entropy: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, weight_gradient = ctx.d_hidden, ctx.weight_gradient
        del ctx.d_hidden, ctx.weight_gradient
        scale = float(g_loss)
        d_weight = None
        if weight_gradient is not None:
            if weight_gradient.in_main_grad and scale != 1.0:
                raise RuntimeError(
                    f"linear_token_loss has already added to main_grad, but backward scales its loss by {scale}: scale "
                    "inside token_loss (Megatron: calculate_per_token_loss, a three-tuple loss, no grad_scale_func)"
                )
            d_weight = weight_gradient.result()
            if d_weight is not None and not weight_gradient.in_main_grad and scale != 1.0:
                d_weight.mul_(scale)
        if d_hidden is not None and scale != 1.0:
            d_hidden.mul_(scale)
        return d_hidden, d_weight, None, None, None, None, None, None, None


def _differentiated(
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

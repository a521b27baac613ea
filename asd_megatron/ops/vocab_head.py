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

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from asd_megatron.ops.head_tiles import Gradients, Tiles, TokenLoss, checked, differentiated
from asd_megatron.ops.head_tiles import backward as fused_backward
from asd_megatron.ops.softmax_tile import Softmax
from asd_megatron.ops.vocab_shard import VocabShard

__all__ = ["TokenLoss", "VocabShard", "linear_logprob", "linear_token_loss"]


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
    rows, block = checked(hidden, weight, target, shard, rows, temperature, token_block)
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
    rows, block = checked(hidden, weight, target, shard, rows, temperature, token_block)
    differentiate = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _LinearTokenLoss.apply(hidden, weight, target, rows, token_loss, shard, temperature, block, differentiate)


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
        tiles = Tiles(hidden, weight, target, rows, shard, temperature, block)
        statistics = torch.empty(4, tiles.count, dtype=tiles.dtype, device=hidden.device)
        for b in tiles.blocks():
            statistics[:, b] = tiles.statistics(tiles.logits(tiles.hidden(b)), b)
        softmax = tiles.reduce(statistics)
        ctx.save_for_backward(hidden, weight, target, rows, *softmax)
        ctx.weight = weight  # the parameter itself: it carries Megatron's attributes
        ctx.settings = (shard, temperature, block)
        ctx.set_materialize_grads(False)
        return softmax.logprob, softmax.entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_logprobs: Tensor | None, g_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, target, rows, *softmax = ctx.saved_tensors
        tiles = Tiles(hidden, weight, target, rows, *ctx.settings)
        gradients = Gradients(tiles, hidden, ctx.weight, *ctx.needs_input_grad[:2])
        g_logprobs = softmax[0].new_zeros(tiles.count) if g_logprobs is None else g_logprobs
        for b in tiles.blocks():
            h = tiles.hidden(b)
            g_h = None if g_entropy is None else g_entropy[b]
            own = Softmax(*(column[b] for column in softmax))
            gradients.add(tiles.logit_gradient(tiles.logits(h), own, g_logprobs[b], g_h, b), h, b)
        d_hidden, weight_gradient = gradients.finish()
        return d_hidden, None if weight_gradient is None else weight_gradient.result(), *[None] * 5


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
        tiles = Tiles(hidden, weight, target, rows, shard, temperature, block)
        needed = ctx.needs_input_grad[:2] if differentiate else (False, False)
        gradients = Gradients(tiles, hidden, weight, *needed)
        loss = torch.zeros((), dtype=tiles.dtype, device=hidden.device)
        logprobs, entropy = torch.empty(2, tiles.count, dtype=tiles.dtype, device=hidden.device)
        for b in tiles.blocks():
            h = tiles.hidden(b)
            tile = tiles.logits(h)
            softmax = tiles.reduce(tiles.statistics(tile, b))
            logprobs[b], entropy[b] = softmax.logprob, softmax.entropy
            part, g_logprobs, g_entropy = differentiated(token_loss, logprobs[b], entropy[b], b, differentiate)
            loss += part
            if differentiate:
                gradients.add(tiles.logit_gradient(tile, softmax, g_logprobs, g_entropy, b), h, b)
        ctx.d_hidden, ctx.weight_gradient = gradients.finish()
        ctx.mark_non_differentiable(logprobs, entropy)
        return loss, logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_loss: Tensor, _g_logprobs: Tensor, _g_entropy: Tensor) -> tuple[Tensor | None, ...]:
        return (*fused_backward(ctx, g_loss, "linear_token_loss"), *[None] * 7)

"""The exact divergence between student and teacher over a sharded vocabulary, with the policy loss, in one pass.

Of every row both distributions come from the same kind of head, p = softmax(hidden @ weight.T / temperature) and q the
same of the teacher's hidden states, and only a tile of both is ever in memory:

                    rank 0                         rank 1
    rows of tile 0  z [n, V / 2], z' [n, V / 2]    z [n, V / 2], z' [n, V / 2]
    rows of tile 1  ...

    1. z and z' by one product (by two, if the teacher has a head of its own)
    2. each rank: softmax statistics of its columns of both
    3. all-gather of [8, n], merged: log-prob of the target and entropy of both
    4. each rank: sums over its columns for the divergence (`divergence_tile.py`)
    5. all-gather of [5, n], added up: D, both KL divergences, F; the token loss is called
    6. gradient of the student's logits in the tile's memory, then two products with it

One rank does steps 2 to 5 in one pass over the logits, without collectives. On CPUs it also processes a tile in two
parts that share the products of step 6 (`head_tiles.PairTiles`); a part is then a block of `teacher` and `token_loss`.

8 N H V flops: steps 1 (4 N H V) and 6 (4 N H V). The teacher gets no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from asd_megatron.ops.divergence_tile import Divergence, DivergenceTile, row_values
from asd_megatron.ops.gemm import operand
from asd_megatron.ops.head_tiles import Gradients, PairTiles, TokenLoss, checked, default_pair_block, differentiated
from asd_megatron.ops.head_tiles import backward as fused_backward
from asd_megatron.ops.softmax_tile import merged
from asd_megatron.ops.vocab_shard import VocabShard

__all__ = ["Divergence", "DivergenceColumns", "TeacherHidden", "VocabShard", "linear_divergence_loss"]

TeacherHidden = Callable[[slice], Tensor]
"""block -> the teacher's hidden states [n, H] of that slice of the N rows, complete on every rank of the shard's group
and in the dtype of the student's. May communicate over that group: every rank calls it once for each block, in order.
"""


class DivergenceColumns(NamedTuple):
    """Of every row, [N] in the accumulation dtype, nats at the temperature, detached.

    `agreement` is 1 where student and teacher have their maximum at the same token, otherwise 0.
    """

    logprobs: Tensor
    entropy: Tensor
    teacher_logprobs: Tensor
    teacher_entropy: Tensor
    divergence: Tensor
    reverse_kl: Tensor
    forward_kl: Tensor
    agreement: Tensor


def linear_divergence_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    token_loss: TokenLoss,
    coefficient: Tensor,
    teacher: TeacherHidden,
    divergence: Divergence,
    shard: VocabShard,
    *,
    teacher_weight: Tensor | None = None,
    rows: Tensor | None = None,
    temperature: float = 1.0,
    token_block: int | None = None,
) -> tuple[Tensor, DivergenceColumns]:
    """sum over rows of `token_loss` + coefficient * D, with its gradient in `hidden` and `weight`.

    `coefficient` [N] is a constant; where it is 0 the teacher's row only enters the columns and must be finite.
    `teacher_weight` [padded rows, H]: the teacher's head, sharded like `weight`; None: the teacher's is `weight`, as a
    constant. The other arguments, `main_grad`, what is collective and what is raised are those of
    `vocab_head.linear_token_loss`. A tile of `token_block` rows takes the memory of twice as many
    rows of logits; of 4 / 3 as many where it is processed in two parts.
    """
    rows, block = checked(
        hidden, weight, target, shard, rows, temperature, token_block or default_pair_block(weight, shard)
    )
    if coefficient.shape != target.shape:
        raise ValueError(f"coefficient must be {tuple(target.shape)}: it is {tuple(coefficient.shape)}")
    if teacher_weight is not None and (teacher_weight.shape, teacher_weight.dtype) != (weight.shape, weight.dtype):
        raise ValueError(
            f"teacher_weight must be {weight.dtype} {tuple(weight.shape)} like weight: it is {teacher_weight.dtype} "
            f"{tuple(teacher_weight.shape)}"
        )
    differentiate = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    call = _Call(token_loss, coefficient.detach(), teacher, divergence, differentiate)
    loss, columns = _LinearDivergenceLoss.apply(
        hidden, weight, target, rows, teacher_weight, shard, temperature, block, call
    )
    return loss, DivergenceColumns(*columns)


class _Call(NamedTuple):
    token_loss: TokenLoss
    coefficient: Tensor
    teacher: TeacherHidden
    divergence: Divergence
    differentiate: bool


class _LinearDivergenceLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        rows: Tensor | None,
        teacher_weight: Tensor | None,
        shard: VocabShard,
        temperature: float,
        block: int,
        call: _Call,
    ) -> tuple[Tensor, Tensor]:
        tiles = PairTiles(hidden, weight, target, rows, shard, temperature, block)
        other = None if teacher_weight is None else operand(teacher_weight.detach()[: shard.rows])
        needed = ctx.needs_input_grad[:2] if call.differentiate else (False, False)
        gradients = Gradients(tiles, hidden, weight, *needed)
        loss = torch.zeros((), dtype=tiles.dtype, device=hidden.device)
        columns = torch.empty(len(DivergenceColumns._fields), tiles.count, dtype=tiles.dtype, device=hidden.device)
        for b in tiles.blocks():
            gradient: Tensor | None = None
            for part in tiles.parts(b):
                states = operand(call.teacher(part).detach())
                logits = tiles.pair(tiles.hidden(part), states, other, at=part.start - b.start)
                scale = call.coefficient[part].to(tiles.dtype)
                tile, sums = _sums(tiles, logits, part, scale / temperature, call.divergence)
                p, q = tile.p, tile.q
                part_loss, g_logprobs, g_entropy = differentiated(
                    call.token_loss, p.logprob, p.entropy, part, call.differentiate
                )
                values = row_values(sums, call.divergence)
                loss += part_loss + (scale * values.divergence).sum()
                columns[:, part] = torch.stack(
                    [p.logprob, p.entropy, q.logprob, q.entropy, values.divergence, *values[2:]]
                )
                if call.differentiate:
                    gradient = tiles.kernels.divergence_gradient_(
                        tile,
                        values.mean,
                        tiles.targets(part),
                        *tiles.scaled(g_logprobs, g_entropy),
                        tiles.gradient_dtype,
                    )
            if gradient is not None:
                gradients.add(tiles.gradient(gradient, b), tiles.hidden(b), b)
        ctx.d_hidden, ctx.weight_gradient = gradients.finish()
        ctx.mark_non_differentiable(columns)
        return loss, columns

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_loss: Tensor, _g_columns: Tensor) -> tuple[Tensor | None, ...]:
        return (*fused_backward(ctx, g_loss, "linear_divergence_loss"), *[None] * 7)


def _sums(
    tiles: PairTiles, logits: Tensor, rows: slice, coefficient: Tensor, divergence: Divergence
) -> tuple[DivergenceTile, Tensor]:
    """Both distributions of logits [2, n, v] and their sums over the complete vocabulary. Two collectives; none on one
    rank."""
    shard, kernels = tiles.shard, tiles.kernels
    if shard.world == 1:
        return kernels.complete_divergence_(logits, tiles.targets(rows), coefficient, divergence)
    parts = shard.gather_ranks(torch.stack([tiles.statistics(part, rows) for part in logits]))  # [ranks, 2, 4, n]
    p, q = (merged(part) for part in parts.unbind(1))
    tile = DivergenceTile(logits, p, q, coefficient, divergence)
    return tile, shard.gather_ranks(kernels.divergence_sums_(tile)).sum(0)

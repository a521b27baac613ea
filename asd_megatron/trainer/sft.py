"""The update of the supervised stage: weighted cross-entropy on given responses, with the same head, packs and
schedules as the RL update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from asd_megatron.distributed.layout import ProcessGroups
from asd_megatron.models.flops import FlopsModel, forward_flops
from asd_megatron.models.port import ModelPort
from asd_megatron.models.routing import LoadBalance, LoadReport, MicroBatchRouting, token_weights
from asd_megatron.ops.vocab_head import linear_token_loss
from asd_megatron.records import ComputedPacks, PackCounts
from asd_megatron.trainer import schedule
from asd_megatron.trainer.balance import assign
from asd_megatron.trainer.batch import Pack, PackLayout, TokenSequence, build_packs
from asd_megatron.trainer.optimizer import Optimizer


class SupervisedExample(Protocol):
    """`loss_weights[t]` scales the cross-entropy of response token t; 0 leaves it out."""

    @property
    def prompt_ids(self) -> tuple[int, ...]: ...
    @property
    def response_ids(self) -> tuple[int, ...]: ...
    @property
    def loss_weights(self) -> tuple[float, ...]: ...


@dataclass(frozen=True)
class SupervisedStats:
    """The result of one optimizer step: `loss` is the weighted mean cross-entropy of the global batch in nats,
    `grad_norm` the global L2 norm before clipping, `applied` False for a skipped step, `tokens` all response tokens,
    `packs` those of this data-parallel rank."""

    loss: float
    grad_norm: float
    applied: bool
    tokens: int
    packs: ComputedPacks
    load: LoadReport | None = None  # of the experts, in a model that has some


def supervised_update(
    port: ModelPort,
    process_groups: ProcessGroups,
    optimizer: Optimizer,
    examples: Sequence[SupervisedExample],
    *,
    layout: PackLayout,
    tokens_per_microbatch: int,
    balance: LoadBalance | None = None,
) -> SupervisedStats:
    """One optimizer step on `examples` (the same list on every rank). Collective over all ranks.

    The loss is sum(weight * -log p) / sum(weight), both sums over the global batch, in every layout. balance: of a
    model with experts. Raises ValueError when no weight is positive.
    """
    assigned = assign([_cost(e, layout.flops) for e in examples], process_groups.dp.size())
    rank = process_groups.dp.rank()
    sequences, weights = [], torch.zeros(0)
    for r, indices in enumerate(assigned):
        row, rank_sequences = 0, []
        for i in indices:
            e = examples[i]
            rank_sequences.append(TokenSequence.of(e.prompt_ids, e.response_ids, row))
            row += len(e.response_ids)
        sequences.append(rank_sequences)
        if r == rank:
            weights = torch.tensor([w for i in indices for w in examples[i].loss_weights], dtype=torch.float32)
    total = sum(sum(e.loss_weights) for e in examples)
    if not total > 0:
        raise ValueError("no response token of this batch has a positive loss weight: nothing to learn from")
    weights = (weights / total).to(port.device)
    packs = build_packs(sequences, rank, tokens_per_microbatch, layout)

    def loss(pack: Pack, hidden: Tensor) -> Tensor:
        w = weights[pack.flat]

        def token_loss(logprobs: Tensor, entropy: Tensor, block: slice) -> Tensor:
            return -(logprobs * w[block]).sum()

        return linear_token_loss(
            hidden, port.head_weight(), pack.targets, token_loss, port.head_shard(), rows=pack.rows
        )[0]

    tokens = sum(len(e.response_ids) for e in examples)

    def routing(pack: Pack) -> MicroBatchRouting:
        return MicroBatchRouting(token_weights(pack.rows, len(pack.numbers), tokens), balance)

    optimizer.zero_grad()
    if balance is not None:
        balance.start()
    losses = schedule.forward_backward(port, packs, loss, None if balance is None else routing)
    load = None if balance is None else balance.finish(tokens, process_groups.world)
    value = sum_over_ranks(losses, process_groups, port.device)
    result = optimizer.step(loss=value)
    computed = ComputedPacks(trained=[p.counts for p in packs])
    return SupervisedStats(value, result.grad_norm, result.applied, tokens, computed, load)


def _cost(example: SupervisedExample, flops: FlopsModel) -> tuple[int]:
    """FLOPs of a forward pass, the one phase of the step."""
    responses = len(example.response_ids)
    return (forward_flops(flops, PackCounts(((0, len(example.prompt_ids) + responses),), responses)),)


def sum_over_ranks(losses: Sequence[Tensor], process_groups: ProcessGroups, device: torch.device) -> float:
    """The global loss from the packs' parts of it: summed over data- and context-parallel ranks, then broadcast from
    the last pipeline stage. Float64 sum; collective, the same on every rank."""
    total = torch.stack(list(losses)).sum() if losses else torch.zeros((), device=device)
    total = total.to(torch.float64).reshape(1)
    if process_groups.dp_cp.size() > 1:
        dist.all_reduce(total, group=process_groups.dp_cp)
    if process_groups.pp.size() > 1:
        dist.broadcast(
            total, src=dist.get_global_rank(process_groups.pp, process_groups.pp.size() - 1), group=process_groups.pp
        )
    return float(total)

"""Scoring passes: log-probability and full-vocabulary entropy of every response token, no gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from asd_megatron.ops.vocab_head import linear_logprob
from asd_megatron.trainer import schedule
from asd_megatron.trainer.align import TokenColumns
from asd_megatron.trainer.batch import Pack, PackLayout, TokenSequence, build_packs


def score(
    port: Any, process_groups: Any, packs: Sequence[Pack], tokens: int, *, temperature: float
) -> tuple[Tensor, Tensor]:
    """Score `packs` under the live weights. Collective over the model-parallel group.

    Returns (log-probs [tokens], entropies [tokens]), float32 nats at `temperature`, the same on every rank of the
    model-parallel group; rows that no pack covers (rollouts without privileged context) are 0.
    """
    columns = TokenColumns(("logprobs", "entropy"), tokens, port.device)

    def visit(pack: Pack, hidden: Tensor) -> None:
        logprobs, entropy = linear_logprob(
            hidden, port.head_weight(), pack.targets, port.head_shard(), rows=pack.rows, temperature=temperature
        )
        columns.put(pack.flat, {"logprobs": logprobs, "entropy": entropy})

    with port.scoring():
        schedule.forward(port, packs, visit)
    shared = columns.share(cp=process_groups.cp, pp=process_groups.pp)
    return shared["logprobs"], shared["entropy"]


def score_sequence(port: Any, process_groups: Any, ids: Sequence[int], layout: PackLayout) -> list[float]:
    """log p(ids[t] | ids[:t]) for t from 1, at temperature 1 under the live weights. Collective over all ranks, the
    same on each."""
    sequence = TokenSequence(tuple(ids), 1, 0)
    replicas = process_groups.dp.size()
    packs = build_packs([[sequence]] * replicas, process_groups.dp.rank(), len(ids), layout)
    logprobs, _ = score(port, process_groups, packs, len(ids) - 1, temperature=1.0)
    return [float(value) for value in logprobs]

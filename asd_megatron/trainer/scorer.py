"""Scoring passes: log-probability and full-vocabulary entropy of every response token, without gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from asd_megatron.distributed.layout import ProcessGroups
from asd_megatron.models.port import ModelPort
from asd_megatron.ops.vocab_head import linear_logprob
from asd_megatron.trainer import schedule
from asd_megatron.trainer.align import share_columns
from asd_megatron.trainer.batch import Pack, PackLayout, TokenSequence, build_packs
from asd_megatron.trainer.columns import Scores


def score(
    port: ModelPort,
    process_groups: ProcessGroups,
    packs: Sequence[Pack],
    tokens: int,
    *,
    temperature: float,
    keep: Callable[[Pack, Tensor], None] | None = None,
    routing: schedule.Routing | None = None,
    fp8: bool | None = None,
) -> Scores:
    """Score `packs` under the live weights. Collective over the model-parallel group.

    Returns the scores of `tokens` table rows, the same on every rank of the model-parallel group. Rows that no pack
    covers (rollouts without privileged context) are 0. `keep(pack, hidden)` is called with each pack's hidden states,
    as `schedule.forward` passes them. `routing`: for a model with experts. `fp8`: as for `ModelPort.scoring`.
    """
    values = torch.zeros(2, tokens, dtype=torch.float32, device=port.device)
    scores = Scores(*values)

    def visit(pack: Pack, hidden: Tensor) -> None:
        logprobs, entropy = linear_logprob(
            hidden, port.head_weight(), pack.targets, port.head_shard(), rows=pack.rows, temperature=temperature
        )
        scores.put(pack.flat, Scores(logprobs, entropy))
        if keep is not None:
            keep(pack, hidden)

    with port.scoring(fp8=fp8):
        schedule.forward(port, packs, visit, routing)
    share_columns(values, cp=process_groups.cp, pp=process_groups.pp)
    return scores


def score_sequence(
    port: ModelPort, process_groups: ProcessGroups, ids: Sequence[int], layout: PackLayout
) -> list[float]:
    """log p(ids[t] | ids[:t]) for t from 1 on, in nats at temperature 1 under the live weights. Collective over all
    ranks; every rank gets the same values."""
    sequence = TokenSequence(np.array(ids, dtype=np.int32), 1, 0)
    replicas = process_groups.dp.size()
    packs = build_packs([[sequence]] * replicas, process_groups.dp.rank(), len(ids), layout)
    return score(port, process_groups, packs, len(ids) - 1, temperature=1.0).logprobs.tolist()

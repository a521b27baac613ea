"""Per-token numbers that stay with their token: (rollout, response position) wherever it was computed.

Student and teacher sequences of a rollout are packed separately, may lie in different packs and are cut differently by
context parallelism; every row of every pack therefore carries its row of the data-parallel rank's token table
(`Pack.flat`), and results come home through it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from asd_megatron.distributed.objects import gather_objects
from asd_megatron.records import TokenTable
from asd_megatron.trainer.batch import Pack


class TokenColumns:
    """Float32 columns [K, N] over a data-parallel rank's response tokens, filled pack by pack on the last pipeline
    stage."""

    def __init__(self, names: tuple[str, ...], tokens: int, device: torch.device) -> None:
        self.names = names
        self.values = torch.zeros(len(names), tokens, dtype=torch.float32, device=device)

    def put(self, flat: Tensor, values: Mapping[str, Tensor]) -> None:
        for k, name in enumerate(self.names):
            if name in values:
                self.values[k, flat] = values[name].to(torch.float32)

    def share(self, *, cp: dist.ProcessGroup, pp: dist.ProcessGroup) -> dict[str, Tensor]:
        """Every rank of the model-parallel group gets whole columns: summed over the context-parallel slices
        (disjoint), then broadcast from the last pipeline stage. Collective on `cp` and `pp`."""
        if cp.size() > 1:
            dist.all_reduce(self.values, group=cp)
        if pp.size() > 1:
            dist.broadcast(self.values, src=dist.get_global_rank(pp, pp.size() - 1), group=pp)
        return {name: self.values[k] for k, name in enumerate(self.names)}


def gather_rows(columns: Mapping[str, Tensor], pack: Pack) -> dict[str, Tensor]:
    """The columns' values at the pack's response rows, in the pack's order."""
    return {name: column[pack.flat] for name, column in columns.items()}


def gather_table(
    table: TokenTable, columns: Mapping[str, Tensor], indices: Sequence[int], process_groups: Any
) -> TokenTable | None:
    """The global batch's token table on global rank 0, its rollouts in the order of the examples; None elsewhere.

    `table` holds this data-parallel rank's rows, `columns` [N] what is known of them (whole on every rank of the
    model-parallel group), `indices` the global number of each of its rollouts. Collective over rank 0's data-parallel
    group.
    """
    root = dist.get_global_rank(process_groups.dp, 0)
    if process_groups.dp.size() > 1 and root != 0:
        return None  # another replica's model-parallel rank: rank 0's own group has everything
    local = TokenTable(table.offsets)
    for name, column in columns.items():
        local[name] = column.detach().cpu()
    shares = gather_objects((list(indices), local), 0, process_groups.dp)
    if process_groups.world.rank() != 0 or shares is None:
        return None
    whole = TokenTable.concatenate([t for _, t in shares])
    order = torch.tensor([i for found, _ in shares for i in found]).argsort()
    lengths = whole.offsets[1:] - whole.offsets[:-1]
    starts = whole.offsets[:-1][order]
    out = TokenTable.for_lengths(lengths[order].tolist())
    within = torch.arange(out.tokens) - out.spread(out.offsets[:-1])
    rows = out.spread(starts) + within
    for name, column in whole.columns.items():
        out[name] = column[rows]
    return out

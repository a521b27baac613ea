"""Alignment of per-token results by (rollout, response position), whatever pack and rank computed them.

Student and teacher sequences of a rollout are packed separately, may lie in different packs and are cut differently by
context parallelism. Every scored row of every pack therefore carries its row of the data-parallel rank's token table
(`Pack.flat`), and results are written back through it:

    table of this rank    rollout A: rows 0 1 2 | rollout B: rows 3 4
    student pack 0        [prompt_B B0 B1 | prompt_A A0 A1 A2]             flat = [3, 4, 0, 1, 2]
    teacher pack 0        [prompt_A solution_A A0 A1 A2]                   flat = [0, 1, 2]
    teacher pack 1        [prompt_B solution_B B0 B1], context parallel:   flat = [3] on one rank, [4] on the other
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from asd_megatron.distributed.layout import ProcessGroups
from asd_megatron.distributed.objects import gather_objects
from asd_megatron.records import TokenTable


def share_columns(values: Tensor, *, cp: dist.ProcessGroup, pp: dist.ProcessGroup) -> None:
    """Make columns [K, N] complete on every rank of the model-parallel group, in place.

    On entry each context-parallel rank of the last pipeline stage has filled its own, disjoint rows and left the others
    0: the slices are summed over `cp`, then broadcast from the last stage of `pp`. Collective on both.
    """
    if cp.size() > 1:
        dist.all_reduce(values, group=cp)
    if pp.size() > 1:
        dist.broadcast(values, src=dist.get_global_rank(pp, pp.size() - 1), group=pp)


def gather_table(
    table: TokenTable, columns: Mapping[str, Tensor], indices: Sequence[int], process_groups: ProcessGroups
) -> TokenTable | None:
    """The global batch's token table on global rank 0, its rollouts in the order of the examples; None elsewhere.

    Collective over all ranks.

    Args:
        table: this data-parallel rank's, for its offsets. columns: [N] each, complete on every rank of the
            model-parallel group. indices: global number of each of the table's rollouts.
    """
    part = None  # rank 0's data-parallel group holds every column already
    if dist.get_global_rank(process_groups.dp, 0) == 0:
        local = TokenTable(table.offsets)
        for name, column in columns.items():
            local[name] = column.detach().cpu()
        part = (list(indices), local)
    parts = gather_objects(part, 0, process_groups.host)
    if parts is None:
        return None
    gathered = [part for part in parts if part is not None]
    merged = TokenTable.concatenate([part for _, part in gathered])
    return _reordered(merged, [index for found, _ in gathered for index in found])


def _reordered(table: TokenTable, indices: Sequence[int]) -> TokenTable:
    """Rollout k of `table` moved to place `indices[k]`.

    Example: rank 0 had rollouts 0 (2 tokens) and 2 (1 token), rank 1 had rollout 1 (3 tokens):

        merged rows   0 1 | 2 | 3 4 5      indices [0, 2, 1]
        order         [0, 2, 1]            merged number of the rollout at each place
        starts        [0, 3, 2]            its first merged row
        rows          0 1 | 3 4 5 | 2      start of its rollout + position within it
    """
    order = torch.tensor(list(indices)).argsort()
    lengths = table.offsets[1:] - table.offsets[:-1]
    starts = table.offsets[:-1][order]
    out = TokenTable.for_lengths(lengths[order].tolist())
    position = torch.arange(out.tokens) - out.spread(out.offsets[:-1])
    rows = out.spread(starts) + position
    for name, column in table.columns.items():
        out[name] = column[rows]
    return out

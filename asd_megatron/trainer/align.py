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

import numpy as np
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

    Collective over all ranks; the columns come from global rank 0's data-parallel group.

    Args:
        table: this data-parallel rank's, for its offsets. columns: [N] each, complete on every rank of the
            model-parallel group. indices: global number of each of the table's rollouts.
    """
    part: _Part | None = None
    if dist.get_global_rank(process_groups.dp, 0) == 0:
        part = list(indices), table.lengths, {name: c.detach().cpu().numpy() for name, c in columns.items()}
    gathered = gather_objects(part, 0, process_groups.host)
    return None if gathered is None else _merged([found for found in gathered if found is not None])


_Part = tuple[list[int], list[int], dict[str, np.ndarray]]
"""Of one data-parallel rank: its rollouts' numbers in the global batch and their lengths, its columns."""


def _merged(parts: Sequence[_Part]) -> TokenTable:
    """Each part's rollouts put in their place. Columns are those that every part has.

    Example: rank 0 had rollouts 0 (2 tokens) and 2 (1 token), rank 1 had rollout 1 (3 tokens):

        parts     0 0 2 | 1 1 1
        merged    0 0 1 1 1 2
    """
    lengths = {index: n for indices, found, _ in parts for index, n in zip(indices, found, strict=True)}
    out = TokenTable.for_lengths([lengths[index] for index in range(len(lengths))])
    starts = out.offsets.tolist()
    names = set.intersection(*[set(columns) for _, _, columns in parts])
    for name in sorted(names):
        merged = np.empty(out.tokens, dtype=parts[0][2][name].dtype)
        for indices, own, columns in parts:
            first = 0
            for index, n in zip(indices, own, strict=True):
                merged[starts[index] : starts[index] + n] = columns[name][first : first + n]
                first += n
        out[name] = torch.from_numpy(merged)
    return out

"""From ragged sequences to balanced, packed (THD) micro-batches.

Three deterministic steps that every rank repeats for itself, so that nothing has to be communicated: sequences are
assigned to data-parallel ranks, each rank's share is cut into packs by a token budget, and each pack is laid out for
this rank's slice of the context-parallel group. Nothing here knows what the sequences mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from asd_megatron.distributed.layout import Layout, ProcessGroups
from asd_megatron.records import PackedTokens
from asd_megatron.trainer import prefixes


@dataclass(frozen=True)
class TokenSequence:
    """One prompt + response. Response token j (id `ids[prompt_length + j]`) owns row `first_row + j` of the batch's
    token table."""

    ids: tuple[int, ...]
    prompt_length: int
    first_row: int

    @property
    def response_length(self) -> int:
        return len(self.ids) - self.prompt_length


@dataclass(frozen=True)
class Pack:
    """One micro-batch: packed tokens and the response rows that the head scores.

    `rows` int64 [N] index this rank's local token dimension (the position whose hidden state predicts the target; with
    sequence parallelism the gathered dimension), `targets` int64 [N] are the response ids, `flat` int64 [N] the rows of
    the token table. A context-parallel rank holds only its own share of the rows; the shares are disjoint and complete.
    """

    tokens: PackedTokens
    rows: Tensor
    targets: Tensor
    flat: Tensor
    real_tokens: int  # of the whole pack, without padding; a shared prefix counts once
    sequence_tokens: int  # the same if nothing were shared


def assign(costs: Sequence[int], ranks: int) -> list[list[int]]:
    """Items to ranks, longest first onto the least loaded rank (ties: the lower rank). Returns sorted item indices per
    rank."""
    loads = [0] * ranks
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = min(range(ranks), key=lambda r: (loads[r], r))
        loads[rank] += costs[item]
        shares[rank].append(item)
    return [sorted(share) for share in shares]


def fill_bins(lengths: Sequence[int], budget: int, at_least: int = 1) -> list[list[int]]:
    """Items into bins of at most `budget` tokens (a longer item gets a bin of its own), first fit decreasing.

    With `at_least` bins asked for and enough items, they are spread evenly instead, when that respects the budget.
    """
    if len(lengths) >= at_least > 1:
        spread = assign(lengths, at_least)
        if all(len(b) == 1 or sum(lengths[i] for i in b) <= budget for b in spread):
            return spread
    bins: list[list[int]] = []
    loads: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for b, load in enumerate(loads):
            if load + lengths[item] <= budget:
                bins[b].append(item)
                loads[b] += lengths[item]
                break
        else:
            bins.append([item])
            loads.append(lengths[item])
    return [sorted(b) for b in bins]


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


@dataclass(frozen=True)
class PackLayout:
    """What the parallel layout asks of a pack: padding multiples, this rank's context-parallel slice, how many packs
    there must be."""

    context: int = 1
    context_rank: int = 0
    tensor: int = 1
    sequence_parallel: bool = False
    pipeline: int = 1
    virtual_pipeline: bool = False
    pad_id: int = 0
    share_prefixes: bool = False
    device: torch.device = torch.device("cpu")

    def __post_init__(self) -> None:
        if self.share_prefixes and self.context > 1:
            raise ValueError("sequences that are cut over context-parallel ranks cannot share prefixes")

    @classmethod
    def of(
        cls,
        layout: Layout,
        process_groups: ProcessGroups,
        device: torch.device,
        pad_id: int = 0,
        share_prefixes: bool = False,
    ) -> PackLayout:
        """This rank's, in a parallel layout."""
        return cls(
            context=layout.context,
            context_rank=process_groups.cp.rank(),
            tensor=layout.tensor,
            sequence_parallel=layout.sequence_parallel,
            pipeline=layout.pipeline,
            virtual_pipeline=layout.virtual_pipeline is not None,
            pad_id=pad_id,
            share_prefixes=share_prefixes,
            device=device,
        )

    @property
    def sequence_multiple(self) -> int:
        return 2 * self.context if self.context > 1 else 1

    @property
    def pack_multiple(self) -> int:
        return self.sequence_multiple * (self.tensor if self.sequence_parallel else 1)

    def count(self, needed: int) -> int:
        """Packs per rank: interleaved schedules need whole rounds of the pipeline."""
        needed = max(needed, 1)
        return _round_up(needed, self.pipeline) if self.virtual_pipeline else needed

    def padded_length(self, length: int) -> int:
        return _round_up(length, self.sequence_multiple)


class Bin(NamedTuple):
    """A pack to be: which sequences, and what each shares with the one before if that is known (`prefixes.tree`)."""

    items: list[int]
    shared: list[int] | None = None


def build_pack(sequences: Sequence[TokenSequence], layout: PackLayout, shared: Sequence[int] | None = None) -> Pack:
    """Lay sequences out as one micro-batch and take this rank's slice. `shared`: as for `prefixes.tree`.

    Without shared prefixes each is padded to the context-parallel multiple; the whole is padded to the
    sequence-parallel one. With no sequences: the smallest legal pack, without response rows (a zero-weight
    micro-batch).
    """
    segments, real = _segments(sequences, layout, shared)
    ids, positions, cu = segments.ids, segments.positions, segments.cu
    pairs = list(zip(segments.where, sequences, strict=False))
    row = prefixes.joined([where[s.prompt_length - 1 : len(s.ids) - 1] for where, s in pairs])
    target = prefixes.joined([np.asarray(s.ids[s.prompt_length :], dtype=np.int64) for s in sequences])
    flat = prefixes.joined([np.arange(s.first_row, s.first_row + s.response_length) for s in sequences])
    if layout.context > 1:
        local = _context_slice(cu, layout)
        where = np.full(cu[-1], -1, dtype=np.int64)
        where[local] = np.arange(len(local))
        ids, positions = ids[local], positions[local]
        mine = where[row] >= 0
        row, target, flat = where[row][mine], target[mine], flat[mine]

    def tensor(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(layout.device)

    packed = PackedTokens(
        input_ids=tensor(ids),
        position_ids=tensor(positions),
        cu_seqlens=torch.tensor(cu, dtype=torch.int32, device=layout.device),
        max_seqlen=max(e - a for a, e in zip(cu, cu[1:], strict=False)),
        parents=segments.parents if any(parent >= 0 for parent in segments.parents) else (),
    )
    tokens = sum(len(s.ids) for s in sequences)
    return Pack(packed, tensor(row), tensor(target), tensor(flat), real, tokens)


def _segments(
    sequences: Sequence[TokenSequence], layout: PackLayout, shared: Sequence[int] | None
) -> tuple[prefixes.Segments, int]:
    """The sequences' tokens, a stretch a sequence or the tree of their prefixes, padded; and how many are no
    padding."""
    if layout.share_prefixes and sequences:
        found = prefixes.tree([s.ids for s in sequences], shared)
        real = found.cu[-1]
        return found.padded(_round_up(real, layout.pack_multiple) - real, layout.pad_id), real
    lengths = [layout.padded_length(len(s.ids)) for s in sequences] or [layout.pack_multiple]
    lengths[-1] += _round_up(sum(lengths), layout.pack_multiple) - sum(lengths)
    given: list[tuple[int, ...]] = [s.ids for s in sequences] or [()]
    padded = [ids + (layout.pad_id,) * (n - len(ids)) for ids, n in zip(given, lengths, strict=True)]
    return prefixes.separate(padded), sum(map(len, given))


def _context_slice(cu: Sequence[int], layout: PackLayout) -> np.ndarray:
    """Positions of the whole pack that this rank holds: chunks r and 2 * CP - 1 - r of every sequence, in that
    order."""
    pieces = []
    for start, end in zip(cu[:-1], cu[1:], strict=True):
        chunk = (end - start) // (2 * layout.context)
        for c in (layout.context_rank, 2 * layout.context - 1 - layout.context_rank):
            pieces.append(np.arange(start + c * chunk, start + (c + 1) * chunk))
    return np.concatenate(pieces)


def build_packs(shares: Sequence[Sequence[TokenSequence]], rank: int, budget: int, layout: PackLayout) -> list[Pack]:
    """This data-parallel rank's packs. `shares[r]` are rank r's sequences: all ranks' counts are needed, because every
    rank must run equally many micro-batches; a rank that has fewer gets zero-weight ones."""
    bins = [_bins(share, budget, layout) for share in shares]
    count = layout.count(max(len(b) for b in bins))
    mine = [build_pack([shares[rank][i] for i in b.items], layout, b.shared) for b in bins[rank]]
    return mine + [build_pack([], layout) for _ in range(count - len(mine))]


def _bins(share: Sequence[TokenSequence], budget: int, layout: PackLayout) -> list[Bin]:
    at_least = layout.pipeline if layout.pipeline > 1 else 1
    if not layout.share_prefixes:
        return [Bin(b) for b in fill_bins([layout.padded_length(len(s.ids)) for s in share], budget, at_least)]
    indices, shared = prefixes.order([s.ids for s in share])  # neighbours in this order share most
    whole = [len(share[i].ids) for i in indices]
    own = [n - s for n, s in zip(whole, shared, strict=True)]
    return [
        Bin([indices[place] for place in places], [0, *(shared[place] for place in places[1:])])
        for places in prefixes.cut(own, whole, budget, at_least)
    ]

"""Micro-batch packing (THD): from sequences of unequal length to balanced packs.

Three deterministic steps: sequences are assigned to data-parallel ranks, each rank's sequences are binned into packs of
about equal FLOPs within a token budget (`trainer.balance` both), and each pack is laid out for this rank's slice of the
context-parallel group. Nothing here knows what the sequences mean.

A pack of two sequences (prompt P, response R), without and with context parallelism 2:

    place          0  1  2  3  4  5  6  7  8            cu_seqlens  0 5 9
    input_ids      P  P  R0 R1 R2 P  R0 R1 R2
    rows           1  2  3  5  6  7                     a hidden state predicts the next token: from the last prompt
    targets        R0 R1 R2 R0 R1 R2                    token to the token before the last

    Context parallelism 2 pads each sequence to a multiple of 4: lengths 8 and 4, chunks of 2 and 1. Rank 0 holds chunks
    0 and 3 of each, rank 1 chunks 1 and 2, and each keeps the rows whose place it holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from asd_megatron.distributed.layout import Layout, ProcessGroups
from asd_megatron.models.attention import zigzag
from asd_megatron.models.flops import TOKENS, FlopsModel, forward_flops
from asd_megatron.records import PackCounts, PackedTokens, as_array
from asd_megatron.trainer import prefixes
from asd_megatron.trainer.balance import cheap_ends, fill_bins, first_fit

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from asd_megatron.records import TokenIds


@dataclass(frozen=True)
class TokenSequence:
    """One prompt + response. Response token j, `ids[prompt_length + j]`, has row `first_row + j` of the token table;
    token i, `ids[i]`, has number `first_token + i` among all tokens of the rank's sequences."""

    ids: TokenIds
    prompt_length: int
    first_row: int
    first_token: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", as_array(self.ids, "int32"))

    @classmethod
    def of(cls, prompt: ArrayLike, response: ArrayLike, first_row: int, first_token: int = 0) -> TokenSequence:
        ids = np.concatenate([as_array(prompt, "int32"), as_array(response, "int32")])
        return cls(ids, np.size(prompt), first_row, first_token)

    @property
    def response_length(self) -> int:
        return len(self.ids) - self.prompt_length


@dataclass(frozen=True)
class Pack:
    """One micro-batch: packed tokens and the rows whose logits the head computes, one for each response token.

    `rows` are places in this rank's tokens (gathered, under sequence parallelism); each predicts the target after it.
    Under context parallelism each rank has the rows whose hidden state it holds: disjoint, together all of them. A pack
    without rows is a zero-weight micro-batch.
    """

    tokens: PackedTokens
    rows: Tensor  # int64 [N]
    targets: Tensor  # int64 [N]: ids of the response tokens
    flat: Tensor  # int64 [N]: rows of the token table
    counts: PackCounts
    sequence_tokens: int  # of the complete pack, without padding, if nothing were shared
    numbers: Tensor  # int64 [T_local]: each token's number; that in its first sequence if several share it, -1: padding

    @property
    def real_tokens(self) -> int:
        """Of the complete pack, without padding; a shared prefix counts once."""
        return self.counts.tokens


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


@dataclass(frozen=True)
class PackLayout:
    """What the parallel layout requires of packs: padding multiples, this rank's context-parallel slice, the number of
    packs; and the model's FLOPs, of which packs and ranks should have equally many."""

    context: int = 1
    context_rank: int = 0
    tensor: int = 1
    sequence_parallel: bool = False
    pipeline: int = 1
    virtual_pipeline: bool = False
    pad_id: int = 0
    share_prefixes: bool = False
    alignment: int = 1  # of the tokens that each rank has of a pack, for FP8 products
    flops: FlopsModel = TOKENS
    device: torch.device = torch.device("cpu")

    def __post_init__(self) -> None:
        if self.share_prefixes and self.context > 1:
            raise ValueError("sequences that are split over context-parallel ranks cannot share prefixes")

    @classmethod
    def of(
        cls,
        layout: Layout,
        process_groups: ProcessGroups,
        device: torch.device,
        pad_id: int = 0,
        share_prefixes: bool = False,
        alignment: int = 1,
        flops: FlopsModel = TOKENS,
    ) -> PackLayout:
        """This rank's, in a parallel layout. Raises ValueError for shared prefixes under context parallelism."""
        return cls(
            context=layout.context,
            context_rank=process_groups.cp.rank(),
            tensor=layout.tensor,
            sequence_parallel=layout.sequence_parallel,
            pipeline=layout.pipeline,
            virtual_pipeline=layout.virtual_pipeline is not None,
            pad_id=pad_id,
            share_prefixes=share_prefixes,
            alignment=alignment,
            flops=flops,
            device=device,
        )

    @property
    def sequence_multiple(self) -> int:
        return 2 * self.context if self.context > 1 else 1

    @property
    def pack_multiple(self) -> int:
        """Of the complete pack: a multiple for every sequence's chunks on every rank, and for each rank's tokens."""
        split = self.tensor if self.sequence_parallel else 1
        return math.lcm(self.sequence_multiple * split, self.alignment * self.context * split)

    def count(self, needed: int) -> int:
        """Packs per rank: at least one, and for the interleaved schedule a multiple of the pipeline's stages."""
        needed = max(needed, 1)
        return _round_up(needed, self.pipeline) if self.virtual_pipeline else needed

    def padded_length(self, length: int) -> int:
        return _round_up(length, self.sequence_multiple)


class Bin(NamedTuple):
    """The sequences of one pack. `shared`: as for `prefixes.build_tree`, where it is known."""

    items: list[int]
    shared: list[int] | None = None


def build_pack(sequences: Sequence[TokenSequence], layout: PackLayout, shared: Sequence[int] | None = None) -> Pack:
    """Lay sequences out as one micro-batch and take this rank's slice of it.

    Without shared prefixes each sequence is padded to the context-parallel multiple; then the pack is padded to the
    sequence-parallel one. Without sequences it is the smallest pack that the layout allows, without rows.
    `shared`: as for `prefixes.build_tree`.
    """
    segments, spans = _segments(sequences, layout, shared)
    ids, positions, cu = segments.ids, segments.positions, segments.cu
    pairs = list(zip(segments.where, sequences, strict=False))
    row = prefixes.concatenated([where[s.prompt_length - 1 : len(s.ids) - 1] for where, s in pairs])
    target = prefixes.concatenated([np.asarray(s.ids[s.prompt_length :], dtype=np.int64) for s in sequences])
    flat = prefixes.concatenated([np.arange(s.first_row, s.first_row + s.response_length) for s in sequences])
    counts = PackCounts(spans, len(row))
    numbers = np.full(cu[-1], -1, dtype=np.int64)
    for where, s in reversed(pairs):
        numbers[where[: len(s.ids)]] = np.arange(s.first_token, s.first_token + len(s.ids))
    if layout.context > 1:
        held = _context_slice(cu, layout)
        local_place = np.full(cu[-1], -1, dtype=np.int64)  # of each place of the pack; -1: another rank holds it
        local_place[held] = np.arange(len(held))
        ids, positions, numbers = ids[held], positions[held], numbers[held]
        mine = local_place[row] >= 0
        row, target, flat = local_place[row][mine], target[mine], flat[mine]

    def tensor(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(layout.device)

    packed = PackedTokens(
        input_ids=tensor(ids),
        position_ids=tensor(positions),
        cu_seqlens=torch.tensor(cu, dtype=torch.int32, device=layout.device),
        max_seqlen=max(e - a for a, e in zip(cu, cu[1:], strict=False)),
        parents=segments.parents if any(parent >= 0 for parent in segments.parents) else (),
        boundaries=tuple(cu),
    )
    tokens = sum(len(s.ids) for s in sequences)
    return Pack(packed, tensor(row), tensor(target), tensor(flat), counts, tokens, tensor(numbers))


def _segments(
    sequences: Sequence[TokenSequence], layout: PackLayout, shared: Sequence[int] | None
) -> tuple[prefixes.Segments, tuple[tuple[int, int], ...]]:
    """(padded tokens, `PackCounts.spans`): a segment for each sequence, or the tree of their prefixes."""
    if layout.share_prefixes and sequences:
        tree = prefixes.build_tree([s.ids for s in sequences], shared)
        real = tree.cu[-1]
        spans = tuple((int(tree.positions[a]), e - a) for a, e in zip(tree.cu, tree.cu[1:], strict=False))
        return tree.padded(_round_up(real, layout.pack_multiple) - real, layout.pad_id), spans
    lengths = [layout.padded_length(len(s.ids)) for s in sequences] or [layout.pack_multiple]
    lengths[-1] += _round_up(sum(lengths), layout.pack_multiple) - sum(lengths)
    given = [s.ids for s in sequences] or [np.zeros(0, dtype=np.int32)]
    padded = [
        np.pad(ids, (0, n - len(ids)), constant_values=layout.pad_id) for ids, n in zip(given, lengths, strict=True)
    ]
    return prefixes.separate(padded), tuple((0, len(s.ids)) for s in sequences)


def _context_slice(cu: Sequence[int], layout: PackLayout) -> np.ndarray:
    """Places of the pack that this context-parallel rank holds, in its order: `zigzag` of every sequence."""
    pieces = [
        start + zigzag(end - start, layout.context, layout.context_rank).numpy()
        for start, end in zip(cu[:-1], cu[1:], strict=True)
    ]
    return np.concatenate(pieces)


def build_packs(by_rank: Sequence[Sequence[TokenSequence]], rank: int, budget: int, layout: PackLayout) -> list[Pack]:
    """This data-parallel rank's packs, of at most `budget` tokens each, planned from the sequences of all ranks."""
    bins = plan_packs(by_rank, budget, layout)[rank]
    return [build_pack([by_rank[rank][i] for i in b.items], layout, b.shared) for b in bins]


def plan_packs(by_rank: Sequence[Sequence[TokenSequence]], budget: int, layout: PackLayout) -> list[list[Bin]]:
    """Each data-parallel rank's packs, of at most `budget` tokens each, as numbers of its sequences.

    Every rank must run equally many micro-batches: a rank with fewer packs gets zero-weight ones, without sequences.
    """
    ranks = [Packing(sequences, budget, layout) for sequences in by_rank]
    count = layout.count(max(rank.needed for rank in ranks))
    return [rank.bins(count) for rank in ranks]


class Packing:
    """One rank's sequences on their way into packs of at most `budget` tokens.

    `needed`: the packs that the rank needs by itself, with pipeline parallelism at least one for each stage.
    """

    def __init__(self, sequences: Sequence[TokenSequence], budget: int, layout: PackLayout) -> None:
        self.sequences, self.budget, self.layout = sequences, budget, layout
        self.lengths = [layout.padded_length(len(s.ids)) for s in sequences]
        self.costs = [self._flops(s) for s in sequences]
        if layout.share_prefixes:
            self.indices, self.shared = prefixes.sort_by_prefix([s.ids for s in sequences])
            self.items = [self._item(i, shared) for i, shared in zip(self.indices, self.shared, strict=True)]
            fewest = prefixes.fewest_bins(self.items, budget)
        else:
            fewest = len(first_fit(self.lengths, budget))
        self.needed = max(fewest, min(layout.pipeline, len(sequences)))

    def bins(self, count: int) -> list[Bin]:
        """`count` packs of about equally many FLOPs, the most expensive first (a pipeline's: `cheap_ends`), then those
        without sequences. `count`: at least `needed`, the same on all ranks."""
        if self.layout.share_prefixes:
            bins = self._with_shared_prefixes(count)
        else:
            bins = [Bin(items) for items in fill_bins(self.lengths, self.costs, self.budget, count)]
        if self.layout.pipeline > 1:
            bins = cheap_ends(bins)
        return bins + [Bin([])] * (count - len(bins))

    def _with_shared_prefixes(self, count: int) -> list[Bin]:
        """Each further pack computes a prefix once more: there are more than needed only where stages wait for each
        other's packs."""
        wanted = count if self.layout.pipeline > 1 else self.needed
        found = prefixes.bin_consecutive(self.items, self.budget, wanted)

        def cost(places: range) -> int:
            return self.items[places[0]].flops + sum(self.items[place].own_flops for place in places[1:])

        return [
            Bin([self.indices[place] for place in places], [0, *(self.shared[place] for place in places[1:])])
            for places in sorted(found, key=cost, reverse=True)
        ]

    def _flops(self, sequence: TokenSequence, shared: int = 0) -> int:
        """Of a forward pass, without the tokens that are `shared` with another sequence."""
        counts = PackCounts(((shared, len(sequence.ids) - shared),), sequence.response_length)
        return forward_flops(self.layout.flops, counts)

    def _item(self, index: int, shared: int) -> prefixes.Item:
        sequence = self.sequences[index]
        own = self._flops(sequence, shared)
        return prefixes.Item(len(sequence.ids) - shared, len(sequence.ids), own, self.costs[index])

"""One step's examples as a data-parallel rank holds them: its share, its token table, its student and teacher packs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from asd_megatron.records import Example, TokenTable
from asd_megatron.trainer import prefixes
from asd_megatron.trainer.batch import Pack, PackLayout, TokenSequence, assign, build_packs


def split_mini_batches(count: int, updates: int) -> list[range]:
    """`count` examples into `updates` contiguous, disjoint mini-batches of equal size (the remainder goes to the first
    ones)."""
    size, extra = divmod(count, updates)
    starts = [k * size + min(k, extra) for k in range(updates + 1)]
    return [range(a, b) for a, b in zip(starts, starts[1:], strict=False)]


def sampled_mask(example: Example, *, mask_truncated: bool) -> tuple[bool, ...]:
    """Which response tokens the loss sees: the sampled ones, none of a truncated response when the recipe masks
    those."""
    if mask_truncated and example.rollout.truncated:
        return (False,) * len(example.rollout.response_ids)
    return example.rollout.loss_mask


def _tokens(examples: Sequence[Example], *, share_prefixes: bool) -> int:
    """Student and teacher tokens to compute for these examples."""
    students = [e.rollout.prompt_ids + e.rollout.response_ids for e in examples]
    teachers = [e.teacher_prompt_ids + e.rollout.response_ids for e in examples if e.teacher_prompt_ids is not None]
    if share_prefixes:
        return prefixes.count(students) + prefixes.count(teachers)
    return sum(map(len, students)) + sum(map(len, teachers))


def _assign(
    examples: Sequence[Example], mini_batch: Sequence[int], ranks: int, *, share_prefixes: bool
) -> list[list[int]]:
    """The mini-batch's examples to ranks, so that the busiest computes few tokens: one by one or, where prefixes are
    shared, prompt by prompt if that is better."""
    if ranks == 1:
        return [list(mini_batch)]
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for i in mini_batch:
        by_prompt.setdefault(examples[i].rollout.prompt_ids, []).append(i)

    def spread(units: Sequence[list[int]], shared: bool) -> list[list[int]]:
        costs = [_tokens([examples[i] for i in unit], share_prefixes=shared) for unit in units]
        return [sorted(i for u in share for i in units[u]) for share in assign(costs, ranks)]

    def busiest(shares: list[list[int]]) -> int:
        return max(_tokens([examples[i] for i in share], share_prefixes=True) for share in shares)

    alone = spread([[i] for i in mini_batch], False)
    if not share_prefixes:
        return alone
    return min(alone, spread(list(by_prompt.values()), True), key=busiest)


@dataclass(frozen=True)
class GlobalCounts:
    """The denominators of one mini-batch over all data-parallel ranks."""

    tokens: int
    sequences: int


@dataclass
class Computed:
    """Tokens of the packs that were built so far, all passes together: `total` with padding, `real` without,
    `sequences` as if no prefix were shared."""

    total: int = 0
    real: int = 0
    sequences: int = 0

    def add(self, packs: Sequence[Pack]) -> None:
        self.total += sum(int(p.tokens.cu_seqlens[-1]) for p in packs)
        self.real += sum(p.real_tokens for p in packs)
        self.sequences += sum(p.sequence_tokens for p in packs)

    def over(self, group: Any, device: torch.device) -> Computed:
        """Summed over the ranks of `group`. Collective."""
        counts = torch.tensor([self.total, self.real, self.sequences], device=device)
        if group.size() > 1:
            dist.all_reduce(counts, group=group)
        return Computed(*counts.tolist())


@dataclass
class LocalBatch:
    """This data-parallel rank's share of a step's examples.

    `shares[m][r]` are the global indices that rank r trains in mini-batch m. The token table's rows follow this rank's
    examples, mini-batch after mini-batch. Every rank builds all shares itself from the same (broadcast) examples;
    nothing depends on placement but the rows' order.
    """

    all_examples: Sequence[Example]
    shares: list[list[list[int]]]
    rank: int
    layout: PackLayout
    tokens_per_microbatch: int
    mask_truncated: bool = False

    def __post_init__(self) -> None:
        self.indices = [i for mini_batch in self.shares for i in mini_batch[self.rank]]
        self.examples = [self.all_examples[i] for i in self.indices]
        self.table = TokenTable.for_lengths([len(e.rollout.response_ids) for e in self.examples])
        self.computed = Computed()
        self._first_row = dict(zip(self.indices, self.table.offsets.tolist(), strict=False))

    @classmethod
    def build(
        cls,
        examples: Sequence[Example],
        *,
        ranks: int,
        rank: int,
        updates: int,
        layout: PackLayout,
        tokens_per_microbatch: int,
        mask_truncated: bool = False,
    ) -> LocalBatch:
        shares = [
            _assign(examples, mini_batch, ranks, share_prefixes=layout.share_prefixes)
            for mini_batch in split_mini_batches(len(examples), updates)
        ]
        return cls(examples, shares, rank, layout, tokens_per_microbatch, mask_truncated)

    # ---------------------------------------------------------------- packs

    def _packs(
        self, shares: Sequence[Sequence[int]], prompt: Callable[[Example], tuple[int, ...] | None]
    ) -> list[Pack]:
        sequences: list[list[TokenSequence]] = []
        for share in shares:
            rank_sequences = []
            for i in share:
                example = self.all_examples[i]
                ids = prompt(example)
                if ids is not None and example.rollout.response_ids:
                    row = self._first_row.get(i, 0)  # other ranks' sequences only count
                    rank_sequences.append(TokenSequence(ids + example.rollout.response_ids, len(ids), row))
            sequences.append(rank_sequences)
        packs = build_packs(sequences, self.rank, self.tokens_per_microbatch, self.layout)
        self.computed.add(packs)
        return packs

    def _every_mini_batch(self) -> list[list[int]]:
        return [[i for mini_batch in self.shares for i in mini_batch[r]] for r in range(len(self.shares[0]))]

    def teacher_packs(self) -> list[Pack]:
        """Privileged prompts with the same response ids; rollouts without context are left out."""
        return self._packs(self._every_mini_batch(), lambda e: e.teacher_prompt_ids)

    def student_packs(self, mini_batch: int | None = None) -> list[Pack]:
        """One mini-batch's student sequences (None: the whole batch's, for a scoring pass)."""
        shares = self._every_mini_batch() if mini_batch is None else self.shares[mini_batch]
        return self._packs(shares, lambda e: e.rollout.prompt_ids)

    # ---------------------------------------------------------------- columns

    def sampled(self, example: Example) -> tuple[bool, ...]:
        return sampled_mask(example, mask_truncated=self.mask_truncated)

    def column(self, of: Callable[[Example], Sequence[float]], dtype: torch.dtype = torch.float32) -> Tensor:
        """A per-token column [N] on the pack layout's device."""
        values = [v for e in self.examples for v in of(e)]
        return torch.tensor(values, dtype=dtype, device=self.layout.device)

    def per_rollout(self, of: Callable[[Example], float], dtype: torch.dtype = torch.float32) -> Tensor:
        """A per-rollout value spread over its tokens: [N]."""
        values = torch.tensor([of(e) for e in self.examples], dtype=dtype)
        return self.table.spread(values).to(self.layout.device)

    def positions(self) -> Tensor:
        """Response position of every row: int64 [N]."""
        starts = self.table.spread(self.table.offsets[:-1])
        return (torch.arange(self.table.tokens) - starts).to(self.layout.device)

    def segments(self) -> Tensor:
        """Local rollout number of every row: int64 [N]."""
        return self.table.spread(torch.arange(self.table.rollouts)).to(self.layout.device)

    def mini_batch_rows(self, mini_batch: int) -> slice:
        """The table rows of one mini-batch (they are contiguous)."""
        before = sum(len(m[self.rank]) for m in self.shares[:mini_batch])
        own = len(self.shares[mini_batch][self.rank])
        return slice(int(self.table.offsets[before]), int(self.table.offsets[before + own]))

    def counts(self, mini_batch: int) -> GlobalCounts:
        """Loss tokens and sequences with any of one mini-batch, over all ranks: the global denominators."""
        tokens = sequences = 0
        for i in (i for share in self.shares[mini_batch] for i in share):
            n = sum(self.sampled(self.all_examples[i]))
            tokens += n
            sequences += n > 0
        return GlobalCounts(tokens, sequences)

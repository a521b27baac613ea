"""One step's examples as a data-parallel rank holds them: its share, its token table, its student and teacher packs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from asd_megatron.records import Example, TokenTable
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


@dataclass(frozen=True)
class GlobalCounts:
    """The denominators of one mini-batch over all data-parallel ranks."""

    tokens: int
    sequences: int


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
        shares = []
        for mini_batch in split_mini_batches(len(examples), updates):
            costs = []
            for i in mini_batch:
                rollout, teacher = examples[i].rollout, examples[i].teacher_prompt_ids
                response = len(rollout.response_ids)
                costs.append(len(rollout.prompt_ids) + response + (len(teacher) + response if teacher else 0))
            shares.append([[mini_batch[j] for j in share] for share in assign(costs, ranks)])
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
        return build_packs(sequences, self.rank, self.tokens_per_microbatch, self.layout)

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

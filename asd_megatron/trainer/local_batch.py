"""One step's examples as a data-parallel rank holds them: its examples, their token table, student and teacher
packs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from asd_megatron.distributed.layout import Layout, ProcessGroups
from asd_megatron.distributed.objects import only_rank_zero
from asd_megatron.models.flops import UPDATE
from asd_megatron.records import ComputedPacks, Example, TokenTable, flat
from asd_megatron.trainer.batch import Bin, Pack, PackLayout, TokenSequence, build_pack
from asd_megatron.trainer.shares import GlobalCounts, Share, loss_mask, plan_shares, scatter_shares

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from asd_megatron.records import TokenIds


@dataclass
class ComputedTokens:
    """Counts the tokens of all packs built so far, scoring passes included."""

    total: int = 0  # with padding
    real: int = 0  # without padding; a shared prefix counts once
    sequences: int = 0  # without padding, as if no prefix were shared

    def add(self, packs: Sequence[Pack]) -> None:
        self.total += sum(p.tokens.host_boundaries()[-1] for p in packs)
        self.real += sum(p.real_tokens for p in packs)
        self.sequences += sum(p.sequence_tokens for p in packs)

    def include(self, other: ComputedTokens) -> None:
        self.total += other.total
        self.real += other.real
        self.sequences += other.sequences

    def over(self, group: dist.ProcessGroup, device: torch.device) -> ComputedTokens:
        """Summed over the ranks of `group`. Collective."""
        counts = torch.tensor([self.total, self.real, self.sequences], device=device)
        if group.size() > 1:
            dist.all_reduce(counts, group=group)
        return ComputedTokens(*counts.tolist())


@dataclass
class LocalBatch:
    """The part of a step's examples that this data-parallel rank trains.

    Rows of the token table follow `share.examples`, mini-batch after mini-batch. Tokens of student sequences, prompts
    included, are numbered likewise: those of example i from `first_tokens[i]` on, `student_tokens` in all.

    `computed` and `packs` count what has been built so far, for passes that are about to run.
    """

    share: Share
    layout: PackLayout

    def __post_init__(self) -> None:
        self.examples, self.indices, self.total = self.share.examples, self.share.indices, self.share.total
        self.table = TokenTable.for_lengths([len(e.rollout.response_ids) for e in self.examples])
        self.computed = ComputedTokens()
        self.packs = ComputedPacks()
        lengths = [len(e.rollout.prompt_ids) + len(e.rollout.response_ids) for e in self.examples]
        self.first_tokens = [0, *itertools.accumulate(lengths)]
        self.student_tokens = sum(lengths)

    @classmethod
    def receive(
        cls,
        examples: Sequence[Example],
        layout: Layout,
        process_groups: ProcessGroups,
        packs: PackLayout,
        *,
        updates: int,
        tokens_per_microbatch: int,
        mask_truncated: bool = False,
        student_forwards: int = UPDATE,
    ) -> LocalBatch:
        """This rank's part of the examples of global rank 0; those of other ranks are not read. As for `plan_shares`.
        Collective over all ranks."""
        plan = partial(
            plan_shares,
            examples,
            ranks=layout.data,
            updates=updates,
            layout=packs,
            tokens_per_microbatch=tokens_per_microbatch,
            mask_truncated=mask_truncated,
            student_forwards=student_forwards,
        )
        shares = only_rank_zero(plan, process_groups.host)
        return cls(scatter_shares(shares, layout, process_groups), packs)

    @property
    def mini_batches(self) -> int:
        return len(self.share.sizes)

    # ---------------------------------------------------------------- packs

    def _build(self, bins: Sequence[Bin], prompt: Callable[[Example], TokenIds | None]) -> list[Pack]:
        """The packs of `bins`, whose examples all have a `prompt`."""
        packs = []
        for b in bins:
            sequences = []
            for i in b.items:
                ids = prompt(self.examples[i])
                assert ids is not None
                response, row = self.examples[i].rollout.response_ids, int(self.table.offsets[i])
                sequences.append(TokenSequence.of(ids, response, row, self.first_tokens[i]))
            packs.append(build_pack(sequences, self.layout, b.shared))
        self.computed.add(packs)
        return packs

    def teacher_packs(self) -> list[Pack]:
        """Privileged prompts followed by the same response ids; rollouts without context are left out."""
        packs = self._build(self.share.teacher, lambda e: e.teacher_prompt_ids)
        self.packs.scored += [p.counts for p in packs]
        return packs

    def student_packs(self, mini_batch: int | None = None) -> list[Pack]:
        """The student sequences of one mini-batch, for an update; None: of the complete batch, for a scoring pass."""
        packs = self._student_packs(mini_batch)
        (self.packs.scored if mini_batch is None else self.packs.trained).extend(p.counts for p in packs)
        return packs

    def update_packs(self) -> list[Pack]:
        """The student packs of all mini-batches, one after another, for a scoring pass over exactly those of the
        updates."""
        packs = [pack for m in range(self.mini_batches) for pack in self._student_packs(m)]
        self.packs.scored += [p.counts for p in packs]
        return packs

    def _student_packs(self, mini_batch: int | None) -> list[Pack]:
        bins = self.share.student if mini_batch is None else self.share.updates[mini_batch]
        return self._build(bins, lambda e: e.rollout.prompt_ids)

    # ---------------------------------------------------------------- columns

    def loss_mask(self, example: Example) -> np.ndarray[Any, np.dtype[np.bool_]]:
        return loss_mask(example, mask_truncated=self.share.mask_truncated)

    def column(self, of: Callable[[Example], ArrayLike], dtype: torch.dtype = torch.float32) -> Tensor:
        """A per-token column [N] on the pack layout's device."""
        return flat([of(e) for e in self.examples], dtype).to(self.layout.device)

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
        before, own = sum(self.share.sizes[:mini_batch]), self.share.sizes[mini_batch]
        return slice(int(self.table.offsets[before]), int(self.table.offsets[before + own]))

    def counts(self, mini_batch: int) -> GlobalCounts:
        """The denominators of a mini-batch, over all data-parallel ranks."""
        return self.share.counts[mini_batch]

    def response_tokens(self, mini_batch: int) -> int:
        """Of a mini-batch over all data-parallel ranks, whether the loss sees them or not."""
        return self.share.response_tokens[mini_batch]

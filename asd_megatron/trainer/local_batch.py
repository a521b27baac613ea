"""One step's examples as a data-parallel rank holds them: its examples, their token table, student and teacher
packs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from asd_megatron.models.flops import FlopsModel, forward_flops
from asd_megatron.records import ComputedPacks, Example, PackCounts, TokenTable
from asd_megatron.trainer import prefixes
from asd_megatron.trainer.balance import assign
from asd_megatron.trainer.batch import Pack, PackLayout, TokenSequence, build_packs
from asd_megatron.trainer.pass_plan import BACKWARD_COST


def split_mini_batches(count: int, updates: int) -> list[range]:
    """`count` examples into `updates` contiguous, disjoint mini-batches of equal size; the first ones get one more each
    if there is a remainder: 7 into 3 gives 0-2, 3-4, 5-6."""
    size, extra = divmod(count, updates)
    starts = [k * size + min(k, extra) for k in range(updates + 1)]
    return [range(a, b) for a, b in zip(starts, starts[1:], strict=False)]


def loss_mask(example: Example, *, mask_truncated: bool) -> tuple[bool, ...]:
    """Which response tokens the loss sees: those that the policy sampled; none of a truncated response with
    `mask_truncated`."""
    if mask_truncated and example.rollout.truncated:
        return (False,) * len(example.rollout.response_ids)
    return example.rollout.loss_mask


@dataclass(frozen=True)
class ExampleCosts:
    """The FLOPs of examples in the two phases of a step between which the ranks meet.

    student_forwards: what the passes over the student's sequences cost, in forward passes; an update is three. The
    teacher's sequences are scored once. shared: prefixes that several examples have in common count once.
    """

    examples: Sequence[Example]
    flops: FlopsModel
    student_forwards: int
    shared: bool

    def of(self, indices: Sequence[int], *, shared: bool) -> tuple[int, int]:
        """(all passes of the student, the teacher's) over these examples on one rank. Logits count at response tokens
        alone, as they are computed."""
        chosen = [self.examples[i] for i in indices]
        taught = [(e, e.teacher_prompt_ids) for e in chosen if e.teacher_prompt_ids is not None]
        student = self._forward([(e.rollout.prompt_ids, e.rollout.response_ids) for e in chosen], shared)
        teacher = self._forward([(prompt, e.rollout.response_ids) for e, prompt in taught], shared)
        return self.student_forwards * student, teacher

    def _forward(self, sequences: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], shared: bool) -> int:
        spans = (
            prefixes.unique_spans([prompt + response for prompt, response in sequences])
            if shared
            else tuple((0, len(prompt) + len(response)) for prompt, response in sequences)
        )
        return forward_flops(self.flops, PackCounts(spans, sum(len(response) for _, response in sequences)))

    def busiest(self, assignment: Sequence[Sequence[int]]) -> int:
        """The work of each phase's busiest rank, both phases together."""
        work = [self.of(indices, shared=self.shared) for indices in assignment]
        return sum(max(of_rank[phase] for of_rank in work) for phase in range(2))


def assign_examples(mini_batch: Sequence[int], ranks: int, costs: ExampleCosts) -> list[list[int]]:
    """The mini-batch's example indices for each rank, so that the busiest rank has little work.

    Single examples balance best. With shared prefixes, keeping a group on one rank computes its prompt once instead of
    on several ranks; the assignment whose busiest rank has less work wins. Two groups of 2 on 2 ranks, prompts of
    100 tokens, responses of 10: by example both ranks may hold both prompts, 220 tokens each; by group 120 each.
    """
    if ranks == 1:
        return [list(mini_batch)]

    def spread(units: Sequence[list[int]], shared: bool) -> list[list[int]]:
        parts = assign([costs.of(unit, shared=shared) for unit in units], ranks)
        return [sorted(i for u in chosen for i in units[u]) for chosen in parts]

    by_example = spread([[i] for i in mini_batch], False)
    if not costs.shared:
        return by_example
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for i in mini_batch:
        by_prompt.setdefault(costs.examples[i].rollout.prompt_ids, []).append(i)
    return min(by_example, spread(list(by_prompt.values()), True), key=costs.busiest)


@dataclass(frozen=True)
class GlobalCounts:
    """The denominators of one mini-batch's loss, over all data-parallel ranks."""

    tokens: int  # that the loss sees
    sequences: int  # with at least one such token


@dataclass
class ComputedTokens:
    """Counts the tokens of all packs built so far, scoring passes included."""

    total: int = 0  # with padding
    real: int = 0  # without padding; a shared prefix counts once
    sequences: int = 0  # without padding, as if no prefix were shared

    def add(self, packs: Sequence[Pack]) -> None:
        self.total += sum(int(p.tokens.cu_seqlens[-1]) for p in packs)
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

    `assignment[m][r]` are the global indices of the examples that rank r trains in mini-batch m. Every rank computes
    the complete assignment from the same (broadcast) examples, without communication. Rows of the token table follow
    this rank's examples, mini-batch after mini-batch:

        assignment  mini-batch 0: rank 0 [0, 3], rank 1 [1, 2]   mini-batch 1: rank 0 [4], rank 1 [5]
        rank 0      indices [0, 3, 4]; rows: tokens of example 0, of 3, of 4
        rank 1      indices [1, 2, 5]; rows: tokens of example 1, of 2, of 5

    `computed` and `packs` count what has been built so far, for passes that are about to run.

    Only the order of the rows depends on the assignment, no result does. Tokens of student sequences, prompts included,
    are numbered likewise: example i's from `first_tokens[i]` on, `student_tokens` in all.
    """

    all_examples: Sequence[Example]
    assignment: list[list[list[int]]]
    rank: int
    layout: PackLayout
    tokens_per_microbatch: int
    mask_truncated: bool = False

    def __post_init__(self) -> None:
        self.indices = [i for mini_batch in self.assignment for i in mini_batch[self.rank]]
        self.examples = [self.all_examples[i] for i in self.indices]
        self.table = TokenTable.for_lengths([len(e.rollout.response_ids) for e in self.examples])
        self.computed = ComputedTokens()
        self.packs = ComputedPacks()
        self._first_row = dict(zip(self.indices, self.table.offsets.tolist(), strict=False))
        lengths = [len(e.rollout.prompt_ids) + len(e.rollout.response_ids) for e in self.examples]
        self.first_tokens = dict(zip(self.indices, [0, *itertools.accumulate(lengths)], strict=False))
        self.student_tokens = sum(lengths)

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
        student_forwards: int = 1 + BACKWARD_COST,
    ) -> LocalBatch:
        """Rank `rank`'s part among `ranks` data-parallel ranks, in `updates` mini-batches; packs of at most
        `tokens_per_microbatch` tokens. student_forwards: as for `ExampleCosts`."""
        costs = ExampleCosts(examples, layout.flops, student_forwards, layout.share_prefixes)
        mini_batches = split_mini_batches(len(examples), updates)
        assignment = [assign_examples(mini_batch, ranks, costs) for mini_batch in mini_batches]
        return cls(examples, assignment, rank, layout, tokens_per_microbatch, mask_truncated)

    @property
    def mini_batches(self) -> int:
        return len(self.assignment)

    # ---------------------------------------------------------------- packs

    def _packs(
        self, by_rank: Sequence[Sequence[int]], prompt: Callable[[Example], tuple[int, ...] | None]
    ) -> list[Pack]:
        sequences: list[list[TokenSequence]] = []
        for indices in by_rank:
            rank_sequences = []
            for i in indices:
                example = self.all_examples[i]
                ids = prompt(example)
                if ids is not None and example.rollout.response_ids:
                    row = self._first_row.get(i, 0)  # of other ranks' sequences only the number of packs matters
                    first = self.first_tokens.get(i, 0)  # of student sequences
                    rank_sequences.append(TokenSequence(ids + example.rollout.response_ids, len(ids), row, first))
            sequences.append(rank_sequences)
        packs = build_packs(sequences, self.rank, self.tokens_per_microbatch, self.layout)
        self.computed.add(packs)
        return packs

    def _every_mini_batch(self) -> list[list[int]]:
        return [[i for mini_batch in self.assignment for i in mini_batch[r]] for r in range(len(self.assignment[0]))]

    def teacher_packs(self) -> list[Pack]:
        """Privileged prompts followed by the same response ids; rollouts without context are left out."""
        packs = self._packs(self._every_mini_batch(), lambda e: e.teacher_prompt_ids)
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
        by_rank = self._every_mini_batch() if mini_batch is None else self.assignment[mini_batch]
        return self._packs(by_rank, lambda e: e.rollout.prompt_ids)

    # ---------------------------------------------------------------- columns

    def loss_mask(self, example: Example) -> tuple[bool, ...]:
        return loss_mask(example, mask_truncated=self.mask_truncated)

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
        before = sum(len(m[self.rank]) for m in self.assignment[:mini_batch])
        own = len(self.assignment[mini_batch][self.rank])
        return slice(int(self.table.offsets[before]), int(self.table.offsets[before + own]))

    def counts(self, mini_batch: int) -> GlobalCounts:
        """The denominators of a mini-batch, from the examples of all ranks."""
        tokens = sequences = 0
        for i in (i for indices in self.assignment[mini_batch] for i in indices):
            n = sum(self.loss_mask(self.all_examples[i]))
            tokens += n
            sequences += n > 0
        return GlobalCounts(tokens, sequences)

    def response_tokens(self, mini_batch: int) -> int:
        """Of a mini-batch over all data-parallel ranks, whether the loss sees them or not."""
        indices = (i for of_rank in self.assignment[mini_batch] for i in of_rank)
        return sum(len(self.all_examples[i].rollout.response_ids) for i in indices)

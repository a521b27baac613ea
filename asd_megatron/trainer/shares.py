"""A step's batch on global rank 0, divided: each data-parallel rank's share of the examples, and how every pass packs
them.

All is decided on global rank 0, which has the examples; `scatter_shares` gives every rank its share and nothing else.
Two mini-batches of a batch of six, on two data-parallel ranks:

    examples    mini-batch 0: rank 0 [0, 3], rank 1 [1, 2]   mini-batch 1: rank 0 [4], rank 1 [5]
    rank 0      indices [0, 3, 4], sizes [2, 1]
    rank 1      indices [1, 2, 5], sizes [2, 1]

Only the order of the rows of a rank's token table depends on the assignment, no result does.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from asd_megatron.distributed.layout import Layout, ProcessGroups
from asd_megatron.distributed.objects import scatter_objects
from asd_megatron.models.flops import UPDATE, FlopsModel, forward_flops
from asd_megatron.records import Example, PackCounts
from asd_megatron.trainer import prefixes
from asd_megatron.trainer.balance import assign
from asd_megatron.trainer.batch import Bin, PackLayout, TokenSequence, plan_packs

if TYPE_CHECKING:
    from asd_megatron.records import TokenIds


@dataclass(frozen=True)
class GlobalCounts:
    """The denominators of one mini-batch's loss, over all data-parallel ranks."""

    tokens: int  # that the loss sees
    sequences: int  # with at least one such token


@dataclass(frozen=True)
class Share:
    """What one data-parallel rank gets of a step's batch.

    `examples`: its own, mini-batch after mini-batch. `indices`: their numbers in the global batch, which has `total`
    examples. For each mini-batch: `sizes`: how many of them are in it; `counts` and `response_tokens` (whether the loss
    sees them or not): over all ranks. The packs of each pass are bins of numbers of `examples`, equally many on every
    rank: `teacher` and `student` of all mini-batches together, `updates` of the student's, one list for each
    mini-batch. Sequences without a response, and for the teacher those without context, are in none.
    """

    examples: list[Example]
    indices: list[int]
    total: int
    sizes: list[int]
    counts: list[GlobalCounts]
    response_tokens: list[int]
    mask_truncated: bool
    teacher: list[Bin]
    student: list[Bin]
    updates: list[list[Bin]]


def loss_mask(example: Example, *, mask_truncated: bool) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which response tokens the loss sees, bool [response tokens]: those that the policy sampled; none of a truncated
    response with `mask_truncated`."""
    mask = example.rollout.loss_mask
    return np.zeros_like(mask) if mask_truncated and example.rollout.truncated else mask


def student_ids(example: Example) -> TokenIds:
    """Prompt and response."""
    return np.concatenate([example.rollout.prompt_ids, example.rollout.response_ids])


def teacher_ids(example: Example) -> TokenIds | None:
    """Privileged prompt and response; None without context."""
    if example.teacher_prompt_ids is None:
        return None
    return np.concatenate([example.teacher_prompt_ids, example.rollout.response_ids])


def plan_shares(
    examples: Sequence[Example],
    *,
    ranks: int,
    updates: int,
    layout: PackLayout,
    tokens_per_microbatch: int,
    mask_truncated: bool = False,
    student_forwards: int = UPDATE,
) -> list[Share]:
    """The shares of `ranks` data-parallel ranks, in `updates` mini-batches; packs of at most `tokens_per_microbatch`
    tokens. Of `layout` counts what is the same on every rank. student_forwards: as for `ExampleCosts`."""
    mini_batches = split_mini_batches(len(examples), updates)
    costs = ExampleCosts(examples, layout.flops, student_forwards, layout.share_prefixes)
    assigned = [_assign_examples(mini_batch, ranks, costs) for mini_batch in mini_batches]
    indices = [[i for by_rank in assigned for i in by_rank[rank]] for rank in range(ranks)]
    sizes = [[len(by_rank[rank]) for by_rank in assigned] for rank in range(ranks)]
    owned = [[examples[i] for i in own] for own in indices]
    everything = [range(len(own)) for own in owned]
    starts = [[0, *itertools.accumulate(own)] for own in sizes]

    def packs(ids: Callable[[Example], TokenIds | None], numbers: Sequence[range]) -> list[list[Bin]]:
        return _plan_pass(owned, numbers, ids, tokens_per_microbatch, layout)

    teacher, student = packs(teacher_ids, everything), packs(student_ids, everything)
    trained = [student]
    if updates > 1:
        trained = [packs(student_ids, [range(s[m], s[m + 1]) for s in starts]) for m in range(updates)]
    seen = [int(loss_mask(e, mask_truncated=mask_truncated).sum()) for e in examples]
    lengths = [len(e.rollout.response_ids) for e in examples]
    return [
        Share(
            examples=owned[rank],
            indices=indices[rank],
            total=len(examples),
            sizes=sizes[rank],
            counts=[GlobalCounts(sum(seen[i] for i in m), sum(seen[i] > 0 for i in m)) for m in mini_batches],
            response_tokens=[sum(lengths[i] for i in m) for m in mini_batches],
            mask_truncated=mask_truncated,
            teacher=teacher[rank],
            student=student[rank],
            updates=[bins[rank] for bins in trained],
        )
        for rank in range(ranks)
    ]


def _plan_pass(
    owned: Sequence[Sequence[Example]],
    numbers: Sequence[range],
    ids: Callable[[Example], TokenIds | None],
    tokens_per_microbatch: int,
    layout: PackLayout,
) -> list[list[Bin]]:
    """Each rank's packs in a pass over the sequences `ids` of its examples with these `numbers`, as bins of numbers.
    `owned`: each rank's examples."""
    chosen: list[list[int]] = []
    sequences: list[list[TokenSequence]] = []
    for examples, of_rank in zip(owned, numbers, strict=True):
        chosen.append([])
        sequences.append([])
        for number in of_rank:
            found, response = ids(examples[number]), len(examples[number].rollout.response_ids)
            if found is not None and response:
                chosen[-1].append(number)
                sequences[-1].append(TokenSequence(found, len(found) - response, 0))
    planned = plan_packs(sequences, tokens_per_microbatch, layout)
    return [
        [b._replace(items=[own[i] for i in b.items]) for b in bins] for own, bins in zip(chosen, planned, strict=True)
    ]


def scatter_shares(shares: Sequence[Share] | None, layout: Layout, process_groups: ProcessGroups) -> Share:
    """This rank's share, from global rank 0, which has all: one for each data-parallel rank. Texts of responses stay
    there. Collective over all ranks."""
    by_rank = None
    if process_groups.host.rank() == 0:
        assert shares is not None
        by_rank = [shares[layout.data_rank(rank)] for rank in range(layout.world_size)]
        by_rank = [by_rank[0], *map(_without_texts, by_rank[1:])]
    return scatter_objects(by_rank, 0, process_groups.host)


def _without_texts(share: Share) -> Share:
    bare = [dataclasses.replace(e, rollout=dataclasses.replace(e.rollout, text="")) for e in share.examples]
    return dataclasses.replace(share, examples=bare)


def split_mini_batches(count: int, updates: int) -> list[range]:
    """`count` examples into `updates` contiguous, disjoint mini-batches of equal size; the first ones get one more each
    if there is a remainder: 7 into 3 gives 0-2, 3-4, 5-6."""
    size, extra = divmod(count, updates)
    starts = [k * size + min(k, extra) for k in range(updates + 1)]
    return [range(a, b) for a, b in zip(starts, starts[1:], strict=False)]


@dataclass(frozen=True)
class ExampleCosts:
    """The FLOPs of examples in the two phases of a step between which the ranks meet.

    student_forwards: what the passes over the student's sequences cost, in forward passes; an update is `UPDATE`. The
    teacher's sequences are scored once. shared: a rank computes prefixes that its examples have in common once.
    """

    examples: Sequence[Example]
    flops: FlopsModel
    student_forwards: int
    shared: bool

    def of(self, indices: Sequence[int], *, shared: bool) -> tuple[int, int]:
        """(all passes of the student, the teacher's) over these examples on one rank. Logits count at response tokens
        alone, as they are computed."""
        chosen = [self.examples[i] for i in indices]
        student = [(e.rollout.prompt_ids, e.rollout.response_ids) for e in chosen]
        taught = [(e.teacher_prompt_ids, e.rollout.response_ids) for e in chosen if e.teacher_prompt_ids is not None]
        return self.student_forwards * self._forward(student, shared), self._forward(taught, shared)

    def _forward(self, sequences: Sequence[tuple[TokenIds, TokenIds]], shared: bool) -> int:
        """Of sequences that consist of prompt and response."""
        spans: tuple[tuple[int, int], ...]
        if shared:
            spans = prefixes.unique_spans([np.concatenate(parts) for parts in sequences])
        else:
            spans = tuple((0, len(prompt) + len(response)) for prompt, response in sequences)
        return forward_flops(self.flops, PackCounts(spans, sum(len(response) for _, response in sequences)))

    def busiest(self, assignment: Sequence[Sequence[int]]) -> int:
        """The work of each phase's busiest rank, both phases together."""
        student, teacher = zip(*[self.of(indices, shared=self.shared) for indices in assignment], strict=True)
        return max(student) + max(teacher)


def _assign_examples(mini_batch: Sequence[int], ranks: int, costs: ExampleCosts) -> list[list[int]]:
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
    by_prompt: dict[bytes, list[int]] = {}
    for i in mini_batch:
        by_prompt.setdefault(costs.examples[i].rollout.prompt_ids.tobytes(), []).append(i)
    return min(by_example, spread(list(by_prompt.values()), True), key=costs.busiest)

"""A rank's part of a batch: assignment, mini-batches, columns and denominators."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from asd_megatron.checks.cases import hard_batch
from asd_megatron.models.flops import FlopsModel
from asd_megatron.records import Example, FinishReason
from asd_megatron.trainer.batch import PackLayout
from asd_megatron.trainer.local_batch import ComputedTokens, LocalBatch
from asd_megatron.trainer.shares import ExampleCosts, GlobalCounts, loss_mask, plan_shares, split_mini_batches


def build(examples: list[Example], ranks: int = 1, rank: int = 0, updates: int = 1, **how: Any) -> LocalBatch:
    layout = PackLayout()
    shares = plan_shares(examples, ranks=ranks, updates=updates, layout=layout, tokens_per_microbatch=64, **how)
    return LocalBatch(shares[rank], layout)


def length(e: Example) -> int:
    return len(e.rollout.response_ids)


@pytest.mark.parametrize(("count", "updates"), [(12, 1), (12, 4), (13, 4), (3, 5), (0, 2)])
def test_mini_batches_are_contiguous_disjoint_and_even(count: int, updates: int) -> None:
    parts = split_mini_batches(count, updates)
    assert [i for part in parts for i in part] == list(range(count))
    assert len(parts) == updates and max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("updates", [1, 3])
@pytest.mark.parametrize("ranks", [1, 2, 5, 20])
def test_every_example_belongs_to_one_rank(ranks: int, updates: int) -> None:
    examples = hard_batch(1)
    batches = [build(examples, ranks, rank, updates) for rank in range(ranks)]
    assert sorted(i for b in batches for i in b.indices) == list(range(len(examples)))
    for m, part in enumerate(split_mini_batches(len(examples), updates)):
        found = [b.indices[sum(b.share.sizes[:m]) :][: b.share.sizes[m]] for b in batches]
        assert sorted(i for indices in found for i in indices) == list(part)
        assert len({len(b.share.updates[m]) for b in batches}) == 1  # equally many packs on every rank
    for b in batches:
        assert [examples[i] for i in b.indices] == list(b.examples)
        assert b.table.tokens == sum(map(length, b.examples))


def test_both_phases_are_spread_by_their_flops() -> None:
    examples = hard_batch(1)
    layout = PackLayout(flops=FlopsModel(body=5, heads=1, head_dim=1, windows=(None, 9), hidden=2, vocab=7))

    def forward(prompt: int, response: int) -> int:
        n = prompt + response
        pairs = sum(p + 1 + min(p + 1, 9) for p in range(n))
        return 2 * 5 * n + 4 * pairs + 2 * response * 2 * 7

    def work(e: Example) -> tuple[int, int]:
        teacher = 0 if e.teacher_prompt_ids is None else forward(len(e.teacher_prompt_ids), length(e))
        return 4 * forward(len(e.rollout.prompt_ids), length(e)), teacher

    costs = ExampleCosts(examples, layout.flops, 4, shared=False)
    assert [costs.of([i], shared=False) for i in range(len(examples))] == [work(e) for e in examples]
    shares = plan_shares(examples, ranks=2, updates=1, layout=layout, tokens_per_microbatch=64, student_forwards=4)
    assignment = [share.indices for share in shares]
    for phase in range(2):
        loads = [sum(work(examples[i])[phase] for i in indices) for indices in assignment]
        assert abs(loads[0] - loads[1]) <= max(work(e)[phase] for e in examples) / 2
    busiest = sum(max(sum(work(examples[i])[phase] for i in part) for part in assignment) for phase in range(2))
    assert costs.busiest(assignment) == busiest


def test_rows_follow_the_rollouts() -> None:
    examples = hard_batch(1)
    batch = build(examples, ranks=2, rank=1, updates=2)
    positions, segments = batch.positions().tolist(), batch.segments().tolist()
    expected = [(k, t) for k, e in enumerate(batch.examples) for t in range(length(e))]
    assert list(zip(segments, positions, strict=True)) == expected
    ids = batch.column(lambda e: e.rollout.response_ids, torch.int64).tolist()
    assert ids == [batch.examples[k].rollout.response_ids[t] for k, t in expected]
    rewards = batch.per_rollout(lambda e: e.reward).tolist()
    assert rewards == [batch.examples[k].reward for k, _ in expected]
    first, second = batch.mini_batch_rows(0), batch.mini_batch_rows(1)
    assert (first.start, first.stop, second.stop) == (0, second.start, batch.table.tokens)
    in_first = split_mini_batches(len(examples), 2)[0]
    owners = [batch.indices[k] for k, _ in expected]
    assert [i in in_first for i in owners] == [r < first.stop for r in range(batch.table.tokens)]


@pytest.mark.parametrize("mask_truncated", [False, True])
def test_denominators_are_of_all_ranks(mask_truncated: bool) -> None:
    examples = [
        replace(e, rollout=replace(e.rollout, finish_reason=FinishReason.LENGTH)) if i % 3 == 0 else e
        for i, e in enumerate(hard_batch(1))
    ]
    examples[1] = replace(examples[1], rollout=replace(examples[1].rollout, loss_mask=(False, False)))
    masks = [loss_mask(e, mask_truncated=mask_truncated) for e in examples]
    for m, part in enumerate(split_mini_batches(len(examples), 2)):
        responses = sum(len(examples[i].rollout.response_ids) for i in part)
        wanted = GlobalCounts(sum(sum(masks[i]) for i in part), sum(any(masks[i]) for i in part))
        for rank in range(3):
            batch = build(examples, 3, rank, 2, mask_truncated=mask_truncated)
            assert batch.counts(m) == wanted and batch.response_tokens(m) == responses
    assert any(masks[0]) != mask_truncated and not any(masks[1])


def test_packs_leave_out_what_has_no_tokens() -> None:
    examples = hard_batch(1)
    silent = replace(examples[3].rollout, response_ids=(), logprobs=(), loss_mask=())
    examples[3] = replace(examples[3], rollout=silent)
    batch = build(examples)
    student = [int(f) for p in batch.student_packs() for f in p.flat]
    teacher = [int(f) for p in batch.teacher_packs() for f in p.flat]
    assert sorted(student) == list(range(batch.table.tokens))
    context = batch.per_rollout(lambda e: e.has_context, torch.bool)
    assert sorted(teacher) == context.nonzero().flatten().tolist() != student
    assert sum(p.real_tokens for p in batch.student_packs()) == sum(
        len(e.rollout.prompt_ids) + length(e) for e in examples if length(e)
    )


def test_a_mini_batch_trains_its_own_rollouts() -> None:
    batch = build(hard_batch(1), ranks=2, rank=0, updates=3)
    for m in range(3):
        rows = batch.mini_batch_rows(m)
        assert sorted(int(f) for p in batch.student_packs(m) for f in p.flat) == list(range(rows.start, rows.stop))


def test_a_scoring_pass_over_the_packs_of_the_updates() -> None:
    trained, scored = (build(hard_batch(1), ranks=2, rank=0, updates=3) for _ in range(2))
    packs = [pack for m in range(3) for pack in trained.student_packs(m)]
    for pack, same in zip(packs, scored.update_packs(), strict=True):
        assert torch.equal(pack.tokens.input_ids, same.tokens.input_ids) and torch.equal(pack.flat, same.flat)
    assert (scored.packs.scored, scored.packs.trained) == (trained.packs.trained, [])  # its cost is a forward pass


def test_every_rank_runs_equally_many_packs() -> None:
    """One long rollout and a short one on two ranks; a rank without any."""
    examples = hard_batch(1)[2:4]
    for chosen in (examples, examples[:1]):
        packs = [build(chosen, 2, rank).student_packs() for rank in range(2)]
        assert len(packs[0]) == len(packs[1])
    assert all(len(p.rows) == 0 for p in packs[1])


def _sharing(examples: list[Example], ranks: int, share: bool) -> list[LocalBatch]:
    layout = PackLayout(share_prefixes=share)
    shares = plan_shares(examples, ranks=ranks, updates=1, layout=layout, tokens_per_microbatch=128)
    return [LocalBatch(own, layout) for own in shares]


def test_groups_stay_together_where_their_prefixes_are_shared() -> None:
    examples = [e for seed in (1, 2) for e in hard_batch(seed)]
    counts: dict[bool, list[ComputedTokens]] = {}
    for share in (False, True):
        batches = _sharing(examples, 2, share)
        for batch in batches:
            batch.student_packs()
            batch.teacher_packs()
        counts[share] = [b.computed for b in batches]
        assert sorted(i for b in batches for i in b.indices) == list(range(len(examples)))
    assert sum(c.sequences for c in counts[True]) == sum(c.sequences for c in counts[False])
    assert all(c.real == c.sequences == c.total for c in counts[False])
    assert max(c.real for c in counts[True]) < 0.8 * max(c.real for c in counts[False])


def test_a_lone_group_is_cut_when_that_leaves_the_busiest_rank_less() -> None:
    group = hard_batch(1)[6:9]  # short prompt, nothing to share: together they would keep one rank waiting
    assert [len(b.indices) for b in _sharing(group, 2, True)] != [3, 0]

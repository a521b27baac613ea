"""Per-token numbers come home to their (rollout, response position) from any pack, rank and context-parallel slice."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from asd_megatron.checks.cases import hard_batch
from asd_megatron.records import TokenTable
from asd_megatron.trainer.align import gather_table, share_columns
from asd_megatron.trainer.batch import Pack, PackLayout
from asd_megatron.trainer.columns import (
    Divergences,
    LossConstants,
    LossInputs,
    Scores,
    TokenInputs,
    UpdateColumns,
    table_columns,
)
from asd_megatron.trainer.local_batch import LocalBatch
from asd_megatron.trainer.shares import plan_shares
from tests.distributed.harness import run_ranks


def build(ranks: int, rank: int, layout: PackLayout, updates: int = 1) -> LocalBatch:
    shares = plan_shares(hard_batch(1), ranks=ranks, updates=updates, layout=layout, tokens_per_microbatch=96)
    return LocalBatch(shares[rank], layout)


def held(cu: list[int], rank: int, context: int) -> torch.Tensor:
    """Positions of the whole pack that a context-parallel rank holds, in its order."""
    if context == 1:
        return torch.arange(cu[-1])
    pieces = []
    for start, end in pairwise(cu):
        chunk = (end - start) // (2 * context)
        for c in (rank, 2 * context - 1 - rank):
            pieces.append(torch.arange(start + c * chunk, start + (c + 1) * chunk))
    return torch.cat(pieces)


def predicting(packs: list[list[Pack]], context: int) -> dict[int, list[tuple[int, tuple[int, ...]]]]:
    """By table row: (target id, the ids that predict it) as the packs of all context-parallel ranks say."""
    found: dict[int, list[tuple[int, tuple[int, ...]]]] = {}
    for slices in zip(*packs, strict=True):  # one pack, as each rank holds it
        cu = slices[0].tokens.cu_seqlens.tolist()
        whole = torch.full((cu[-1],), -1)
        for rank, pack in enumerate(slices):
            whole[held(cu, rank, context)] = pack.tokens.input_ids
        for rank, pack in enumerate(slices):
            at = held(cu, rank, context)[pack.rows].tolist()
            for end, target, flat in zip(at, pack.targets.tolist(), pack.flat.tolist(), strict=True):
                start = max(c for c in cu[:-1] if c <= end)
                found.setdefault(flat, []).append((target, tuple(whole[start : end + 1].tolist())))
    return found


@pytest.mark.parametrize("context", [1, 2, 4])
@pytest.mark.parametrize("ranks", [1, 2])
def test_teacher_and_student_meet_at_rollout_and_position(ranks: int, context: int) -> None:
    """Their sequences lie in different packs and slices; a table row is the same response token in both."""
    for rank in range(ranks):
        batches = [build(ranks, rank, PackLayout(context=context, context_rank=c), updates=2) for c in range(context)]
        batch = batches[0]
        student = predicting([b.student_packs() for b in batches], context)
        teacher = predicting([b.teacher_packs() for b in batches], context)
        row = 0
        for e in batch.examples:
            for t, token in enumerate(e.rollout.response_ids):
                before = tuple(e.rollout.response_ids[:t])
                assert student[row] == [(token, (*e.rollout.prompt_ids, *before))]
                if e.teacher_prompt_ids is None:
                    assert row not in teacher
                else:
                    assert teacher[row] == [(token, (*e.teacher_prompt_ids, *before))]
                row += 1
        assert len(student) == row == batch.table.tokens


@pytest.mark.parametrize(("importance", "exact"), [(False, False), (True, False), (True, True)])
def test_columns_are_filled_pack_by_pack(importance: bool, exact: bool) -> None:
    """Every column of an update reaches its own row of the one tensor that is shared, and is read back from there."""
    batch = build(1, 0, PackLayout())
    tokens, device = batch.table.tokens, torch.device("cpu")
    columns, values = UpdateColumns.zeros(tokens, device, importance=importance, exact=exact)
    for pack in batch.student_packs():
        given = [pack.targets * 100 + k for k in range(len(values))]
        divergences = Divergences(*given[-4:]) if exact else None
        scores, clipped, constants = Scores(*given[:2]), given[2], LossConstants(*given[3 : 8 if importance else 6])
        columns.put(pack.flat, UpdateColumns(scores, clipped, constants, divergences))
    ids = batch.column(lambda e: e.rollout.response_ids)
    assert torch.equal(values, torch.stack([ids * 100 + k for k in range(len(values))]))
    for pack in batch.student_packs():
        assert torch.equal(columns.at(pack.flat).clipped, pack.targets * 100.0 + 2)


def token_inputs(n: int) -> TokenInputs:
    at, mask = torch.arange(n), torch.arange(n) % 2 == 0
    return TokenInputs(at + 0.5, at + 0.25, mask, ~mask, mask, -at.float(), at)


def test_rows_are_picked_in_nested_columns_and_absent_ones_stay_absent() -> None:
    scores = Scores(torch.arange(5.0), torch.arange(5.0) + 10)
    whole = LossInputs(token_inputs(5), torch.arange(5.0), teacher=scores)
    for rows in (torch.tensor([4, 1]), slice(1, 3)):
        part = whole.at(rows)
        assert part.frozen is None and part.teacher is not None
        assert torch.equal(part.teacher.entropy, scores.entropy[rows])
        assert torch.equal(part.inputs.segment, torch.arange(5)[rows])
        assert part.inputs.loss_mask.dtype is torch.bool


def test_the_table_names_what_was_computed() -> None:
    scores = Scores(torch.arange(3.0), torch.arange(3.0) + 10)
    plain = LossConstants(torch.zeros(3), torch.ones(3), torch.full((3,), 2.0))
    corrected = LossConstants(plain.pmi, plain.term, plain.advantage, torch.full((3,), 3.0), torch.ones(3))
    clipped = torch.tensor([0.0, 1.0, 0.0])
    alone = table_columns(token_inputs(3), None, UpdateColumns(scores, clipped, plain))
    both = table_columns(token_inputs(3), scores, UpdateColumns(scores, clipped, corrected))
    assert set(both) - set(alone) == {"teacher_logprobs", "teacher_entropy", "importance", "importance_affected"}
    assert torch.equal(both["teacher_entropy"], scores.entropy) and torch.equal(both["pmi"], plain.pmi)
    assert torch.equal(both["clipped"], clipped) and torch.equal(both["importance"], torch.full((3,), 3.0))


def _tables(rank: int) -> list[Any]:
    world = dist.group.WORLD
    groups = SimpleNamespace(dp=world, host=world)
    found: list[Any] = []
    for updates in (1, 3):
        batch = build(2, rank, PackLayout(), updates)
        columns = {
            "id": batch.column(lambda e: e.rollout.response_ids),
            "position": batch.positions().float(),
            "rollout": batch.per_rollout(lambda e: int(e.rollout.prompt_id[1:]) * 10 + e.rollout.sample),
        }
        found.append(gather_table(batch.table, columns, batch.indices, groups))
    lonely = TokenTable.for_lengths([3] if rank == 1 else [])  # rank 0 has nothing
    found.append(gather_table(lonely, {"x": torch.arange(float(lonely.tokens))}, [0] if rank == 1 else [], groups))
    return found


def _on_rank(rank: int) -> tuple[list[Any], list[float]]:
    return _tables(rank), _shares(rank)


@pytest.fixture(scope="module")
def ranks() -> list[Any]:
    return run_ranks(_on_rank, 2)


def test_the_table_is_in_the_order_of_the_examples(ranks: list[Any]) -> None:
    mine, others = (tables for tables, _ in ranks)
    assert others == [None] * 3
    examples = hard_batch(1)
    for table in mine[:2]:
        rows = [row.tolist() for row in table.rows("id")]
        assert rows == [list(map(float, e.rollout.response_ids)) for e in examples]
        assert [row.tolist() for row in table.rows("position")] == [list(map(float, range(len(r)))) for r in rows]
        for e, row in zip(examples, table.rows("rollout"), strict=True):
            assert set(row.tolist()) == {int(e.rollout.prompt_id[1:]) * 10.0 + e.rollout.sample}
    assert mine[2]["x"].tolist() == [0.0, 1.0, 2.0]


def _shares(rank: int) -> list[float]:
    """Two ranks as context-parallel ones with disjoint slices, then as two pipeline stages."""
    world = dist.group.WORLD
    assert world is not None
    summed, last = torch.zeros(1, 4), torch.zeros(1, 2)
    summed[0, [0, 2] if rank == 0 else [1, 3]] = torch.tensor([1.0, 2.0]) + 10 * rank
    if rank == 1:
        last[0] = torch.tensor([5.0, 6.0])
    alone: Any = SimpleNamespace(size=lambda: 1)
    share_columns(summed, cp=world, pp=alone)
    share_columns(last, cp=alone, pp=world)
    return [*summed[0].tolist(), *last[0].tolist()]


def test_columns_are_shared_over_slices_and_stages(ranks: list[Any]) -> None:
    assert [shared for _, shared in ranks] == [[1.0, 11.0, 2.0, 12.0, 5.0, 6.0]] * 2

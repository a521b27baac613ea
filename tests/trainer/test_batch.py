"""Packing: nothing lost, nothing doubled, every response row where its token is."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from asd_megatron.trainer.batch import PackLayout, TokenSequence, build_pack, build_packs
from asd_megatron.trainer.local_batch import ComputedTokens


def sequences(seed: int, count: int) -> list[TokenSequence]:
    rng, row, out = random.Random(seed), 0, []
    for _ in range(count):
        prompt, response = rng.randint(1, 9), rng.randint(1, 30)
        out.append(TokenSequence(tuple(rng.randrange(5, 90) for _ in range(prompt + response)), prompt, row))
        row += response
    return out


@pytest.mark.parametrize("context", [1, 2, 4])
@pytest.mark.parametrize("tensor", [1, 2])
def test_rows_of_all_context_ranks_are_the_response_tokens(context: int, tensor: int) -> None:
    batch = sequences(3, 7)
    seen: dict[int, int] = {}
    lengths = set()
    for rank in range(context):
        layout = PackLayout(context=context, context_rank=rank, tensor=tensor, sequence_parallel=tensor > 1)
        pack = build_pack(batch, layout)
        lengths.add(len(pack.tokens.input_ids))
        assert len(pack.tokens.input_ids) % tensor == 0
        steps = pack.tokens.cu_seqlens[1:] - pack.tokens.cu_seqlens[:-1]
        assert (steps % (2 * context if context > 1 else 1) == 0).all()
        for row, target, flat in zip(pack.rows.tolist(), pack.targets.tolist(), pack.flat.tolist(), strict=True):
            owner = next(s for s in batch if s.first_row <= flat < s.first_row + s.response_length)
            position = owner.prompt_length + flat - owner.first_row
            assert target == owner.ids[position]
            assert int(pack.tokens.input_ids[row]) == owner.ids[position - 1]  # the state that predicts it
            assert int(pack.tokens.position_ids[row]) == position - 1
            assert flat not in seen
            seen[flat] = target
    assert len(lengths) == 1  # every context rank holds equally many tokens
    assert len(seen) == sum(s.response_length for s in batch)


@pytest.mark.parametrize(("context", "tensor"), [(1, 1), (2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("alignment", [16, 32, 128])
def test_each_ranks_tokens_are_aligned_and_padding_is_counted(alignment: int, context: int, tensor: int) -> None:
    batch = sequences(5, 7)
    sizes: dict[str, Any] = {"context": context, "tensor": tensor, "sequence_parallel": tensor > 1}
    held, rows = [], []
    for rank in range(context):
        pack = build_pack(batch, PackLayout(**sizes, context_rank=rank, alignment=alignment))
        assert len(pack.tokens.input_ids) % (alignment * tensor) == 0
        held += [number for number in pack.numbers.tolist() if number >= 0]
        rows += pack.flat.tolist()
        cu = pack.tokens.cu_seqlens
        assert int(cu[-1]) == len(pack.tokens.input_ids) * context
        # Padding follows the last sequence: the boundaries before it are those of unaligned packs.
        plain = build_pack(batch, PackLayout(**sizes, context_rank=rank)).tokens.cu_seqlens
        assert torch.equal(cu[:-1], plain[:-1]) and int(cu[-1]) - int(plain[-1]) < alignment * tensor * context
        computed = ComputedTokens()
        computed.add([pack])
        assert (computed.total, computed.real) == (int(cu[-1]), sum(len(s.ids) for s in batch))
    assert sorted(rows) == list(range(sum(s.response_length for s in batch)))  # every response token once, no padding
    assert len(held) == sum(len(s.ids) for s in batch)


def test_every_rank_gets_equally_many_packs_and_an_empty_rank_gets_zero_weight_ones() -> None:
    shares = [sequences(5, 9), [], sequences(6, 2)]
    counts = []
    for rank in range(3):
        packs = build_packs(shares, rank, 40, PackLayout())
        counts.append(len(packs))
        assert sum(len(p.rows) for p in packs) == sum(s.response_length for s in shares[rank])
        assert all(len(p.tokens.input_ids) > 0 and p.real_tokens <= 40 for p in packs)
        sizes = [p.real_tokens for p in packs]
        assert sizes == sorted(sizes, reverse=True)  # the k-th packs of all ranks are alike
        assert 0 not in sizes or len(shares[rank]) < len(packs)
    assert len(set(counts)) == 1 and counts[0] > 1


@pytest.mark.parametrize("pipeline", [2, 4])
def test_interleaved_schedules_get_whole_rounds(pipeline: int) -> None:
    for count in (1, 3, 9):
        layout = PackLayout(pipeline=pipeline, virtual_pipeline=True)
        assert len(build_packs([sequences(1, count)], 0, 40, layout)) % pipeline == 0


def test_pad_tokens_never_enter_the_rows() -> None:
    pack = build_pack([], PackLayout(context=2, tensor=2, sequence_parallel=True, pad_id=3))
    assert torch.equal(pack.tokens.input_ids, torch.full((4,), 3))
    assert len(pack.rows) == len(pack.targets) == len(pack.flat) == 0

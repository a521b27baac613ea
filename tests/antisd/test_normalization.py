"""Scaling the term from statistics that add up over any split of the tokens."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from asd_megatron.antisd import finish_term, moments, term_statistics


def ragged(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    segment = torch.repeat_interleave(torch.arange(5), torch.tensor([1, 7, 0, 4, 20]))
    term = torch.randn(32, dtype=torch.float64, generator=g) * 4 + 3
    mask = torch.rand(32, generator=g) < 0.7
    return term, mask, segment


@given(st.integers(0, 2**31))
def test_sequence_normalisation_by_hand(seed: int) -> None:
    term, mask, segment = ragged(seed)
    out = finish_term(term, mask, statistics=term_statistics(term, mask, segment, 5), segment=segment)
    for k in range(5):
        here = mask & (segment == k)
        if here.any():
            x = term[here]
            expected = (x - x.mean()) / x.std(correction=0).clamp(min=1e-6)
            torch.testing.assert_close(out[here], expected, rtol=1e-9, atol=1e-8)
    assert (out[~mask] == 0).all()


@given(st.integers(0, 2**31))
def test_batch_normalisation_by_hand_and_clip(seed: int) -> None:
    term, mask, _ = ragged(seed)
    out = finish_term(term, mask, statistics=term_statistics(term, mask), clip=1.0)
    x = term[mask]
    torch.testing.assert_close(out[mask], ((x - x.mean()) / x.std(correction=0)).clamp(-1, 1))
    assert (out[~mask] == 0).all()


@given(st.integers(0, 2**31), st.integers(1, 4))
def test_statistics_add_up_over_ranks(seed: int, ranks: int) -> None:
    term, mask, segment = ragged(seed)
    owner = torch.randint(ranks, (32,), generator=torch.Generator().manual_seed(seed))
    parts = [term_statistics(term[owner == r], mask[owner == r], segment[owner == r], 5) for r in range(ranks)]
    torch.testing.assert_close(sum(parts), term_statistics(term, mask, segment, 5))


def test_masked_tokens_do_not_enter_the_statistics() -> None:
    term = torch.tensor([1.0, 3.0, float("nan")])
    mask = torch.tensor([True, True, False])
    assert term_statistics(term, mask).tolist() == [[4.0, 10.0, 2.0]]
    assert finish_term(term, mask, statistics=term_statistics(term, mask)).tolist() == [-1.0, 1.0, 0.0]


def test_equal_terms_and_empty_segments_become_zero() -> None:
    term, mask = torch.full((6,), 0.1), torch.tensor([True] * 5 + [False])
    segment = torch.tensor([0, 0, 0, 0, 1, 2])
    statistics = term_statistics(term, mask, segment, 4)
    mean, std = moments(statistics)
    assert mean[2:].tolist() == [0, 0]
    assert (std == 1e-6).all()
    assert finish_term(term, mask, statistics=statistics, segment=segment).abs().max() < 1e-6
    assert finish_term(term[:0], mask[:0], statistics=term_statistics(term[:0], mask[:0])).shape == (0,)


def test_without_scale_the_mean_alone_is_subtracted() -> None:
    term = torch.tensor([1.0, 5.0, 3.0, -9.0, 100.0])
    mask, segment = torch.tensor([True, True, False, True, True]), torch.tensor([0, 0, 0, 1, 2])
    statistics = term_statistics(term, mask, segment, 3)
    out = finish_term(term, mask, statistics=statistics, segment=segment, clip=1.5, scale=False)
    assert out.tolist() == [-1.5, 1.5, 0.0, 0.0, 0.0]


def test_without_statistics_only_clip_and_mask_act() -> None:
    term, mask = torch.tensor([-4.0, 0.5, 9.0]), torch.tensor([True, True, False])
    assert finish_term(term, mask).tolist() == [-4.0, 0.5, 0.0]
    assert finish_term(term, mask, clip=3.0).tolist() == [-3.0, 0.5, 0.0]
    assert finish_term(term, mask).dtype == torch.float32

"""A small, uneven batch: two groups, one rollout without context, one truncated, one empty, one with a forced token."""

from __future__ import annotations

import torch

from asd_megatron.records import DemonstrationSource, Example, FinishReason, Rollout, TokenTable

CONTEXT = (True, True, False, True)


def make_examples() -> list[Example]:
    rollouts = [
        Rollout("p1", 0, (1, 2, 3), (7, 8, 9), (-0.5, -1.0, -1.5), FinishReason.STOP, 4),
        Rollout("p1", 1, (1, 2, 3), (7, 5), (-0.25, -2.0), FinishReason.LENGTH, 4, loss_mask=(True, False)),
        Rollout(
            "p2",
            0,
            (4, 5),
            (6, 6, 7, 8),
            (-0.1, -0.2, -0.3, -0.4),
            FinishReason.STOP,
            4,
            version_changes=((1, 5), (3, 6)),
        ),
        Rollout("p2", 1, (4, 5), (), (), FinishReason.STOP, 4),
    ]
    sources = (
        DemonstrationSource.REFERENCE,
        DemonstrationSource.GROUP,
        DemonstrationSource.NONE,
        DemonstrationSource.GROUP,
    )
    samples, rewards, advantages = (-1, 0, -1, 0), (1.0, 0.0, 0.5, 0.5), (0.707, -0.707, 0.0, 0.0)
    return [
        Example(r, reward, advantage, (1, 2, 99, 3) if context else None, source, sample)
        for r, reward, advantage, context, source, sample in zip(
            rollouts, rewards, advantages, CONTEXT, sources, samples, strict=True
        )
    ]


def make_table(*, teacher: bool = True) -> TokenTable:
    """Nine tokens; the teacher's columns are garbage (NaN, 1e9) for the rollout without context."""
    table = TokenTable.for_lengths([3, 2, 4, 0])
    table["student_logprobs"] = torch.tensor([-0.5, -1.0, -1.0, -0.25, -2.5, -0.1, -0.2, -0.3, -0.4])
    table["student_entropy"] = torch.tensor([0.1, 0.2, 0.3, 0.4, 9.0, 0.5, 0.6, 0.7, 0.8])
    if teacher:
        nan = float("nan")
        table["teacher_logprobs"] = torch.tensor([-1.5, -0.5, -1.25, -0.25, -0.5, nan, 1e9, 0, 0])
        table["teacher_entropy"] = torch.tensor([1.0, 2.0, 4.0, 3.0, 9.0, nan, 1e9, 0, 0])
        table["pmi"] = torch.tensor([-1.0, 0.5, -0.25, 0.0, 2.0, nan, 1e9, 0, 0])
        table["term"] = torch.tensor([-0.3, 0.2, -0.1, 0.0, 1.0, 0, 0, 0, 0])
        table["divergence"] = torch.tensor([0.1, 0.2, 0.3, 0.4, 9.0, nan, 1e9, 0, 0])
        table["reverse_kl"], table["forward_kl"] = table["divergence"] * 2, table["divergence"] * 3
        table["agreement"] = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0, 0, 0])
    table["advantage"] = torch.tensor([1.0, 0.5, 0.75, -0.75, 8.0, 0, 0, 0, 0])
    table["importance"] = torch.tensor([1.0, 2.0, 0.5, 0.25, 0.0, 2.0, 1.0, 1.0, 0.25])
    table["importance_affected"] = torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    table["loss_mask"] = torch.tensor([True, True, True, True, False, True, True, True, True])
    table["clipped"] = torch.tensor([True, False, False, True, True, False, False, False, False])
    return table

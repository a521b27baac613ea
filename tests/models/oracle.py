"""What `transformers` says about a folder's model, and the same batch packed for any layout."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asd_megatron.checks.reference import reference
from asd_megatron.records import PackedTokens

BATCHES = ([9, 1, 5], [17], [2, 2, 3, 11], [6, 4])
"""Sequence lengths of four micro-batches: uneven, one of a single token, four so that interleaving has its rounds."""


@dataclass
class Oracle:
    """Per micro-batch and sequence: `ids` int64 [n], `hidden` [n, H] after the final norm, `logits` [n, vocab].

    `gradients`: by name, of the sum of -log p(next token) over all of them.
    """

    ids: list[list[Tensor]]
    hidden: list[list[Tensor]]
    logits: list[list[Tensor]]
    gradients: dict[str, Tensor]


def oracle(folder: Path) -> Oracle:
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    generator = torch.Generator().manual_seed(5)
    ids = [[torch.randint(vocabulary, (n,), generator=generator) for n in lengths] for lengths in BATCHES]
    found = reference(folder, [i for batch in ids for i in batch])
    hidden, logits = iter(found.hidden), iter(found.logits)
    return Oracle(
        ids, [[next(hidden) for _ in b] for b in BATCHES], [[next(logits) for _ in b] for b in BATCHES], found.gradients
    )


@dataclass
class Micro:
    """A packed micro-batch of one rank. `source` int64 [T_local]: which token of the concatenated sequences each holds,
    -1 for padding; `targets` int64 [T_local]: the next token, -1 where there is none."""

    tokens: PackedTokens
    source: Tensor
    targets: Tensor


def pack(ids: list[Tensor], *, context: int, rank: int, multiple: int) -> Micro:
    """Sequences padded to 2 * context each (context > 1), the last one further to `multiple` tokens in all; this
    context-parallel rank's two chunks of every sequence."""
    each = 2 * context if context > 1 else 1
    lengths = [-(-len(i) // each) * each for i in ids]
    while sum(lengths) % multiple:
        lengths[-1] += each
    cu, tokens, positions, source, targets, seen = [0], [], [], [], [], 0
    for i, length in zip(ids, lengths, strict=True):
        padding = torch.full((length - len(i),), -1)
        whole = torch.cat([i, padding.clamp_min(0)])
        origin = torch.cat([seen + torch.arange(len(i)), padding])
        after = torch.cat([i[1:], torch.full((1,), -1), padding])
        chunk = length // each
        mine = torch.cat([torch.arange(c * chunk, (c + 1) * chunk) for c in (rank, 2 * context - 1 - rank)])
        if context == 1:
            mine = torch.arange(length)
        tokens.append(whole[mine])
        positions.append(mine)
        source.append(origin[mine])
        targets.append(after[mine])
        cu.append(cu[-1] + length)
        seen += len(i)
    packed = PackedTokens(
        torch.cat(tokens), torch.cat(positions), torch.tensor(cu, dtype=torch.int32), max_seqlen=max(lengths)
    )
    return Micro(packed, torch.cat(source), torch.cat(targets))


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value."""
    return float((found.detach() - expected).abs().max() / expected.abs().max().clamp_min(1e-12))


def as_plain(o: Oracle) -> dict[str, Any]:
    return {"ids": o.ids, "hidden": o.hidden, "logits": o.logits, "gradients": o.gradients}

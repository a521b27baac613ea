"""What `transformers` says about a folder's model, and the same batch packed for any layout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(5)
    out = Oracle([], [], [], {})
    for lengths in BATCHES:
        ids = [torch.randint(model.config.vocab_size, (n,), generator=generator) for n in lengths]
        results = [model(i[None], output_hidden_states=True) for i in ids]
        for i, r in zip(ids, results, strict=True):
            if len(i) > 1:
                torch.nn.functional.cross_entropy(r.logits[0, :-1], i[1:], reduction="sum").backward()
        out.ids.append(ids)
        out.hidden.append([r.hidden_states[-1][0].detach() for r in results])
        out.logits.append([r.logits[0].detach() for r in results])
    given = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    out.gradients = {n: g for name, gradient in given for n, g in _named(name, gradient)}
    return out


def _named(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A tensor under its name in a folder: `transformers` fuses all experts of a layer in memory alone."""
    prefix, _, last = name.rpartition(".")
    for expert, mine in enumerate(tensor) if prefix.endswith(".experts") else ():
        for part, half in zip(last.split("_")[:-1], mine.chunk(2) if last == "gate_up_proj" else (mine,), strict=True):
            yield f"{prefix}.{expert}.{part}_proj.weight", half
    if not prefix.endswith(".experts"):
        yield name, tensor


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

"""What `transformers` computes from a model folder: logits, hidden states, gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor


@dataclass
class Reference:
    """Of each sequence of n tokens, float32: `logits` [n, vocab], `hidden` [n, H] after the final norm. `gradients`: by
    Hugging Face name, of the sum of -log p(next token) over all sequences."""

    logits: list[Tensor] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)


def reference(folder: Path, sequences: Sequence[Tensor], *, gradients: bool = True) -> Reference:
    """Run the folder's model in float32 on each sequence (int64 [n]) by itself, with eager attention."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    out = Reference()
    with torch.set_grad_enabled(gradients):
        for ids in sequences:
            result = model(ids[None], output_hidden_states=True)
            if gradients and len(ids) > 1:
                torch.nn.functional.cross_entropy(result.logits[0, :-1], ids[1:], reduction="sum").backward()
            out.logits.append(result.logits[0].detach())
            out.hidden.append(result.hidden_states[-1][0].detach())
    given = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    out.gradients = {n: g for name, gradient in given for n, g in named(name, gradient)}
    return out


def named(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A tensor under its name in a folder: `transformers` fuses all experts of a layer in memory alone."""
    prefix, _, last = name.rpartition(".")
    for expert, mine in enumerate(tensor) if prefix.endswith(".experts") else ():
        for part, half in zip(last.split("_")[:-1], mine.chunk(2) if last == "gate_up_proj" else (mine,), strict=True):
            yield f"{prefix}.{expert}.{part}_proj.weight", half
    if not prefix.endswith(".experts"):
        yield name, tensor

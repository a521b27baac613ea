"""A toy model with the part of ModelPort's contract that the embedded engine uses, and one-process groups."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from asd_megatron.records import Problem, Prompt

VOCAB = 40


class ToyPort(nn.Module):
    """One attention layer with absolute positions: 4 query heads on 2 key heads, logits in float32.

    `forwards` records (rows, tokens a row) of every forward; `inside` is True within `sampling()`.
    """

    is_first_stage = is_last_stage = True
    max_positions = 512
    device = torch.device("cpu")

    def __init__(self, sharpness: float = 3.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.chunks = [self]
        self.tokens, self.positions, self.q, self.k, self.v, self.head = (
            nn.Parameter(torch.randn(shape, generator=generator))
            for shape in [(VOCAB, 32), (self.max_positions, 32), (32, 32), (32, 16), (32, 16), (32, VOCAB)]
        )
        self.sharpness = sharpness
        self.forwards: list[tuple[int, int]] = []
        self.inside = False
        self.poison_at = -1

    @contextlib.contextmanager
    def sampling(self) -> Iterator[None]:
        self.inside = True
        yield
        self.inside = False

    def decode(self, input_ids: Tensor, position_ids: Tensor, cache: Any) -> Tensor:
        assert self.inside and not torch.is_grad_enabled()
        rows, steps = input_ids.shape
        self.forwards.append((rows, steps))
        x = (self.tokens[input_ids] + self.positions[position_ids]).transpose(0, 1)
        q, k, v = ((x @ w / 32**0.5).view(steps, rows, -1, 8) for w in (self.q, self.k, self.v))
        x = cache.newest(x + cache.attend(1, q, k, v, None))
        logits = (x @ self.head).transpose(0, 1) * (self.sharpness / 32**0.5)
        if len(self.forwards) == self.poison_at:
            logits[0] = float("nan")
        return logits

    def full(self, ids: Sequence[int]) -> Tensor:
        """Logits at every position of one sequence, without a cache: [t, VOCAB]."""
        x = self.tokens[list(ids)] + self.positions[: len(ids)]
        q, k, v = ((x @ w / 32**0.5).view(len(ids), -1, 8).transpose(0, 1) for w in (self.q, self.k, self.v))
        k, v = k.repeat_interleave(2, 0), v.repeat_interleave(2, 0)
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return (x + out.transpose(0, 1).reshape(len(ids), 32)) @ self.head * (self.sharpness / 32**0.5)


class ToyTokenizer:
    """Token i is the letter i (a, b, ... from 1), 0 a special token."""

    def convert_ids_to_tokens(self, token_id: int) -> str | None:
        return chr(96 + token_id) if token_id < VOCAB else None

    def decode(self, ids: Sequence[int], skip_special_tokens: bool, **kwargs: bool) -> str:
        return "".join(chr(96 + i) if i else ("" if skip_special_tokens else "<end>") for i in ids)


@dataclass
class Versioned:
    """A weight source that nobody reads."""

    version: int

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        raise AssertionError("the weights are the trainer's own: there is nothing to read")


def one_process_groups() -> Any:
    """All groups of one rank; `dist` must be initialised with world size 1."""
    world = dist.group.WORLD
    return SimpleNamespace(tp=world, pp=world, cp=world, dp=world, dp_cp=world, world=world, host=world)


def prompt(name: str, ids: Sequence[int]) -> Prompt:
    return Prompt(Problem(prompt_id=name, answer="", prompt=name), tuple(ids))

"""Numbers that are not finite: stopped at once where they come from, skipped and counted where a step can be left out.

A rollout or scoring pass with NaN or infinity means broken weights or a broken kernel: training stops and names the
phase, the step and the rollouts. A single update whose loss or gradient overflows is left out, weights and optimizer
untouched; only a row of them stops the run. Pure: no communication. Every rank that calls `check_update` sees the same
(already reduced) numbers, so all ranks decide alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from asd_megatron.errors import UserError
from asd_megatron.records import Example, Rollout, TokenTable

SHOWN = 4  # rollouts that a message names
OF_THE_TEACHER = ("teacher_logprobs", "teacher_entropy")


class NotFinite(UserError):
    """Training met a number that is not finite and cannot go on."""


def _stop(phase: str, step: int, name: str, places: Sequence[tuple[Rollout, int]], hint: str) -> NotFinite:
    """`places`: (rollout, response position) of every bad token."""
    first: dict[str, int] = {}
    for rollout, position in places:
        first.setdefault(f"{rollout.prompt_id}/{rollout.sample}", position)
    shown = ", ".join(f"{label} at response position {position}" for label, position in list(first.items())[:SHOWN])
    more = f" and {len(first) - SHOWN} more" if len(first) > SHOWN else ""
    plural = "s" if len(first) > 1 else ""
    return NotFinite(
        f"step {step}, {phase}: {name} is not finite for {len(places)} token{'s' if len(places) > 1 else ''} of "
        f"rollout{plural} {shown}{more}. {hint}"
    )


def check_rollouts(rollouts: Iterable[Rollout], step: int) -> None:
    """Every engine log-probability of a sampled token is finite. Raises NotFinite (phase `rollout`)."""
    places = [
        (rollout, t)
        for rollout in rollouts
        for t, (logprob, sampled) in enumerate(zip(rollout.logprobs, rollout.loss_mask, strict=True))
        if sampled and not math.isfinite(logprob)
    ]
    if places:
        hint = "The engine's weights or its numerics are broken: resume from the last checkpoint, try float32"
        raise _stop("rollout", step, "the engine's log-prob", places, hint)


def check_scores(phase: str, examples: Sequence[Example], table: TokenTable, names: Iterable[str], step: int) -> None:
    """The table's float columns `names` are finite at every token that means something: sampled ones, and for the
    teacher's columns only those of rollouts with context. Columns that are absent pass.

    `table` holds the examples' tokens in the same order. Raises NotFinite, naming phase, step and rollouts.
    """
    sampled = torch.tensor([m for e in examples for m in e.rollout.loss_mask], dtype=torch.bool)
    has_context = table.spread(torch.tensor([e.has_context for e in examples], dtype=torch.bool))
    for name in names:
        if name not in table:
            continue
        mask = sampled & has_context if name in OF_THE_TEACHER else sampled
        bad = mask & ~torch.isfinite(table[name].cpu())
        if bad.any():
            hint = "The weights or the precision are broken: resume from an earlier checkpoint, lower the learning rate"
            raise _stop(phase, step, name, _places(bad, examples, table), hint)


def _places(bad: Tensor, examples: Sequence[Example], table: TokenTable) -> list[tuple[Rollout, int]]:
    flat = bad.nonzero().flatten()
    owner = torch.searchsorted(table.offsets, flat, right=True) - 1
    position = flat - table.offsets[owner]
    return [(examples[i].rollout, t) for i, t in zip(owner.tolist(), position.tolist(), strict=True)]


class Guard:
    """Counts the updates that were left out because their loss or gradient norm was not finite.

    Up to `max_consecutive_skips` in a row are tolerated; the next one stops the run. A finite update ends the row.
    """

    def __init__(self, max_consecutive_skips: int = 3) -> None:
        if max_consecutive_skips < 0:
            raise ValueError(f"max_consecutive_skips {max_consecutive_skips} is negative")
        self.max_consecutive_skips = max_consecutive_skips
        self.skipped = 0
        self.consecutive = 0

    def check_update(self, loss: float, grad_norm: float, step: int) -> bool:
        """Whether the update counts; False: it is to be left out, or was. Raises NotFinite after too many in a row."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.consecutive = 0
            return True
        self.skipped += 1
        self.consecutive += 1
        if self.consecutive > self.max_consecutive_skips:
            raise NotFinite(
                f"step {step}, update: loss {loss} and gradient norm {grad_norm} in the {self.consecutive}. update "
                "in a row that had to be skipped. Resume from the last checkpoint with a lower "
                "optimizer.learning_rate, or with model.dtype float32"
            )
        return False

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "consecutive": self.consecutive}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped, self.consecutive = int(state["skipped"]), int(state["consecutive"])

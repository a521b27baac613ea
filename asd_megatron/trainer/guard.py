"""The guard against non-finite numbers: an error where they mean broken weights, else a skipped update.

A rollout or scoring pass with NaN or infinity means broken weights or a broken kernel: training stops and names the
phase, the step and the rollouts. An update whose loss or gradient norm is not finite is skipped, and so is a spike of
the norm where the optimizer's rule says so (`spikes`); weights and optimizer state stay as they were. Too many skipped
updates in a row stop the run, and no training checkpoint is written while `Guard.consecutive` is above 0. Pure: no
communication. `check_update` gets numbers that are already reduced, so all ranks decide alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from asd_megatron.errors import NotFinite, plural
from asd_megatron.records import Example, Rollout, TokenTable, flat

SHOWN = 4  # rollouts that a message names
OF_THE_TEACHER = ("teacher_logprobs", "teacher_entropy")


def _stop(phase: str, step: int, name: str, places: Sequence[tuple[Rollout, int]], hint: str) -> NotFinite:
    """`places`: (rollout, response position) of every bad token."""
    first: dict[str, int] = {}
    for rollout, position in places:
        first.setdefault(f"{rollout.prompt_id}/{rollout.sample}", position)
    shown = ", ".join(f"{label} at response position {position}" for label, position in list(first.items())[:SHOWN])
    more = f" and {len(first) - SHOWN} more" if len(first) > SHOWN else ""
    return NotFinite(
        f"step {step}, {phase}: {name} is not finite for {plural(len(places), 'token')} of "
        f"rollout{'s' if len(first) > 1 else ''} {shown}{more}. {hint}"
    )


def first_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor that holds a NaN or an infinity; None when all are finite.

    One pass over memory without temporary copies, and one wait for the device.
    """
    names, extremes = [], []
    for name, tensor in tensors:
        if tensor.numel():
            names.append(name)
            extremes.append(torch.stack(torch.aminmax(tensor.detach())).float())  # both are NaN if one element is
    if not names:
        return None
    finite = torch.isfinite(torch.stack(extremes)).all(dim=1).tolist()
    return next((name for name, ok in zip(names, finite, strict=True) if not ok), None)


def check_rollouts(rollouts: Iterable[Rollout], step: int) -> None:
    """Every engine log-probability of a sampled token is finite. Raises NotFinite (phase `rollout`)."""
    places = [
        (rollout, int(t))
        for rollout in rollouts
        for t in np.flatnonzero(rollout.loss_mask & ~np.isfinite(rollout.logprobs))
    ]
    if places:
        hint = "The engine's weights or its numerics are broken: resume from the last checkpoint, try float32"
        raise _stop("rollout", step, "the engine's log-prob", places, hint)


def check_scores(phase: str, examples: Sequence[Example], table: TokenTable, names: Iterable[str], step: int) -> None:
    """The table's float columns `names` are finite at every sampled token; the teacher's columns are checked for
    rollouts with context only. Absent columns pass.

    `table` holds the examples' tokens in the same order. Raises NotFinite, naming phase, step and rollouts.
    """
    sampled = flat([e.rollout.loss_mask for e in examples], torch.bool)
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
    """Counts the updates that were skipped because their loss or gradient norm was not finite, or a spike.

    `skipped`: since the start of the run. `consecutive`: since the last applied update. Up to `max_consecutive_skips`
    in a row are tolerated; the next one stops the run.
    """

    def __init__(self, max_consecutive_skips: int = 3) -> None:
        if max_consecutive_skips < 0:
            raise ValueError(f"max_consecutive_skips {max_consecutive_skips} is negative")
        self.max_consecutive_skips = max_consecutive_skips
        self.skipped = 0
        self.consecutive = 0

    def check_update(self, loss: float, grad_norm: float, step: int, *, applied: bool = True) -> bool:
        """Whether the update is applied; False: it is skipped. applied: False for a spike that the optimizer's rule has
        skipped. Raises NotFinite after too many in a row."""
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if finite and applied:
            self.consecutive = 0
            return True
        self.skipped += 1
        self.consecutive += 1
        if self.consecutive > self.max_consecutive_skips:
            other = "train in model.dtype float32"
            if finite:
                other = "set optimizer.grad_spike clip if the new norms are what you expect"
            raise NotFinite(
                f"step {step}, update: loss {loss:g} and gradient norm {grad_norm:g} in the {self.consecutive}. update "
                "in a row that had to be skipped. Start the same command again with a lower optimizer.learning_rate to "
                f"resume from the last checkpoint, or {other}"
            )
        return False

    def __str__(self) -> str:
        updates = "update was" if self.consecutive == 1 else f"{self.consecutive} updates were"
        return f"the last {updates} skipped (loss or gradient norm not finite, or a spike)"

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "consecutive": self.consecutive}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped, self.consecutive = int(state["skipped"]), int(state["consecutive"])

"""Spreading work over ranks and micro-batches: integers in, indices out, without communication and the same everywhere.

What counts is the work of the busiest rank in each phase of a step, because the ranks meet between the teacher's
scoring pass and the update. Packs of a rank are bounded by their tokens, which memory has to hold, and should be alike
in their FLOPs: with pipeline parallelism the most expensive pack stalls all stages.

FLOPs are those of `models.flops`: linear in the tokens of a sequence, and quadratic in layers that attend to all of
them. For Qwen3-8B a sequence of 32,768 tokens costs 1.6 times as much as a pack of as many tokens in short sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

T = TypeVar("T")
ENOUGH = 1.0005
"""The search for a better spread ends when the busiest part has at most this multiple of the least possible work."""
CANDIDATES = 256
"""Items on each side of an exchange that a step of the search looks at: some milliseconds."""
SCALE_BITS = 30  # of the sum of all costs: squares of loads then fit into int64


def assign(costs: Sequence[Sequence[int]], parts: int) -> list[list[int]]:
    """Items to parts (ranks), so that the work of each phase's busiest part, summed over the phases, is small.

    `costs[i][p]`: work of item i in phase p. Returns each part's item indices, sorted. In one phase, costs 5 3 3 2 1 on
    2 parts: [[0, 3], [1, 2, 4]].
    """
    spread = _Spread.greedy(_scaled(costs), [0] * len(costs), 0, parts)
    assert spread is not None, "items without a size fit everywhere"
    spread.improve()
    return spread.members()


def first_fit(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Items into bins of at most `budget` tokens by first fit decreasing; a longer item gets a bin of its own."""
    bins: list[list[int]] = []
    loads: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for b, load in enumerate(loads):
            if load + lengths[item] <= budget:
                bins[b].append(item)
                loads[b] += lengths[item]
                break
        else:
            bins.append([item])
            loads.append(lengths[item])
    return bins


def fill_bins(lengths: Sequence[int], costs: Sequence[int], budget: int, count: int) -> list[list[int]]:
    """Items into at most `count` bins of at most `budget` tokens (a longer item alone), about equally expensive.

    `count` is at least that of `first_fit`. Returns the bins that have items, the most expensive first: the k-th packs
    of all ranks, which meet in collectives where experts are divided over ranks, are then alike, and a pass needs most
    memory at its beginning.
    """
    work = _scaled([(cost,) for cost in costs])
    spread = _Spread.greedy(work, lengths, budget, count)
    if spread is None:
        spread = _Spread.of(first_fit(lengths, budget), work, lengths, budget, count)
    spread.improve()
    bins = [items for items in spread.members() if items]
    return sorted(bins, key=lambda items: -sum(costs[i] for i in items))


def cheap_ends(packs: Sequence[T]) -> list[T]:
    """The order in which packs pass through a pipeline, of packs with the most expensive first: 9 7 5 3 1 become
    1 5 9 7 3. While the first pack moves to the last stage, and the last pack's gradients to the first, the other
    stages wait."""
    rising = packs[::-1]
    return [*rising[0::2], *rising[1::2][::-1]]


def _scaled(costs: Sequence[Sequence[int]]) -> np.ndarray:
    """int64 [items, phases], divided by a power of two so that their sum has `SCALE_BITS` bits at most."""
    total = sum(sum(phases) for phases in costs)
    shift = max(total.bit_length() - SCALE_BITS, 0)
    found = [[cost >> shift for cost in phases] for phases in costs]
    return np.array(found, dtype=np.int64).reshape(len(costs), len(costs[0]) if costs else 1)


@dataclass
class _Spread:
    """Which part has which item. `loads`, `filled`: the parts' work and tokens."""

    work: np.ndarray  # int64 [items, phases]
    sizes: np.ndarray  # int64 [items], tokens
    budget: int  # tokens of a part with more than one item
    owner: np.ndarray  # int64 [items], the part
    loads: np.ndarray  # int64 [parts, phases]
    filled: np.ndarray  # int64 [parts]

    @classmethod
    def of(
        cls, members: Sequence[Sequence[int]], work: np.ndarray, sizes: Sequence[int], budget: int, parts: int
    ) -> _Spread:
        owner = np.zeros(len(work), dtype=np.int64)
        for part, items in enumerate(members):
            owner[list(items)] = part
        tokens = np.array(sizes, dtype=np.int64)
        loads, filled = np.zeros((parts, work.shape[1]), dtype=np.int64), np.zeros(parts, dtype=np.int64)
        np.add.at(loads, owner, work)
        np.add.at(filled, owner, tokens)
        return cls(work, tokens, budget, owner, loads, filled)

    @classmethod
    def greedy(cls, work: np.ndarray, sizes: Sequence[int], budget: int, parts: int) -> _Spread | None:
        """The most expensive item first, each to the part with the least work that has room for it; None if none has.
        An item above the budget fits into an empty part."""
        cost = work.sum(1).tolist()
        loads, filled = [0] * parts, [0] * parts
        members: list[list[int]] = [[] for _ in range(parts)]
        for item in sorted(range(len(cost)), key=lambda i: (-cost[i], i)):
            fits = [p for p in range(parts) if filled[p] + sizes[item] <= budget or not members[p]]
            if not fits:
                return None
            part = min(fits, key=lambda p: (loads[p], p))
            members[part].append(item)
            loads[part] += cost[item]
            filled[part] += sizes[item]
        return cls.of(members, work, sizes, budget, parts)

    def members(self) -> list[list[int]]:
        return [np.flatnonzero(self.owner == part).tolist() for part in range(len(self.loads))]

    def improve(self) -> None:
        """Moves and exchanges of single items, while they lower the busiest parts' work, summed over the phases, or at
        the same sum the squares of all parts' work."""
        items, parts = len(self.work), len(self.loads)
        if parts < 2 or not items:
            return
        least = np.maximum(self.work.max(0), self.work.sum(0) / parts).sum()
        for _ in range(2 * items):
            if self.loads.max(0).sum() <= ENOUGH * least:
                return
            if not any(self._step(int(busiest)) for busiest in dict.fromkeys(self.loads.argmax(0).tolist())):
                return

    def _step(self, busiest: int) -> bool:
        """The best move or exchange between part `busiest` and another, if it lowers what `improve` lowers.

        All candidates at once: a row for each item of the busiest part; a column for each item of the other parts, to
        exchange it with, and then one for each other part, to move it to. In large batches `CANDIDATES` of each.
        """
        loads, parts = self.loads, len(self.loads)
        own, others = (_some(np.flatnonzero(held)) for held in (self.owner == busiest, self.owner != busiest))
        target = np.concatenate([self.owner[others], np.delete(np.arange(parts), busiest)])  # part of each column
        both = np.column_stack([self.work, self.sizes])  # work and tokens travel together
        back = np.concatenate([both[others], np.zeros((parts - 1, both.shape[1]), dtype=np.int64)])
        change = both[own][:, None] - back
        change, tokens = change[..., :-1], change[..., -1]  # that leave the busiest part, by candidate
        here, there = loads[busiest] - change, loads[target] + change
        alone = np.sort(np.vstack([np.zeros_like(loads[:1]), np.delete(loads, busiest, 0)]), 0)
        rest = np.where(loads[target] == alone[-1], alone[-2], alone[-1])  # most work of parts that stay as they are
        peak = np.maximum(np.maximum(here, there), rest).sum(-1)
        squares = (here**2 + there**2 - loads[busiest] ** 2 - loads[target] ** 2).sum(-1)
        now, never = loads.max(0).sum(), np.iinfo(np.int64).max
        better = (peak < now) | ((peak == now) & (squares < 0))
        better &= (self.filled[busiest] - tokens <= self.budget) & (self.filled[target] + tokens <= self.budget)
        if not better.any():
            return False
        peak = np.where(better, peak, never)
        row, column = np.unravel_index(int(np.where(peak == peak.min(), squares, never).argmin()), peak.shape)
        part = int(target[column])
        loads[busiest], loads[part] = here[row, column], there[row, column]
        self.filled[busiest] -= tokens[row, column]
        self.filled[part] += tokens[row, column]
        self.owner[own[row]] = part
        if column < len(others):
            self.owner[others[column]] = busiest
        return True


def _some(items: np.ndarray) -> np.ndarray:
    """At most `CANDIDATES` of them, evenly spread."""
    return items[:: max(-(-len(items) // CANDIDATES), 1)]

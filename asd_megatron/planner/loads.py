"""What the data-parallel ranks compute in a pass: tokens, attending pairs, rows of the head and packs.

Sequences have the quantiles of the response length, and are spread over ranks and packs by the trainer's own rules
(`trainer.balance`). With 256 rollouts on 256 ranks the busiest rank has the longest response, and the others wait for
it: that is in the numbers here, not in a factor.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from asd_megatron.models.family import ModelShape
from asd_megatron.models.flops import UPDATE, FlopsModel, attending_pairs, flops_model, forward_flops
from asd_megatron.planner import lengths
from asd_megatron.planner.setting import Training, Workload
from asd_megatron.records import PackCounts
from asd_megatron.trainer.balance import assign, first_fit


@dataclass(frozen=True)
class Load:
    """Sums over some packs, complete ones: all context- and tensor-parallel ranks together.

    Attributes:
        tokens: of the sequences. pairs: attending pairs of a query and a key, mean of the layers.
        rows: hidden states whose logits are computed. packs: how many.
    """

    tokens: float
    pairs: float
    rows: float
    packs: float

    def __mul__(self, factor: float) -> Load:
        return Load(self.tokens * factor, self.pairs * factor, self.rows * factor, self.packs * factor)


@dataclass(frozen=True)
class Spread:
    """One pass over the sequences of a mini-batch. `mean` and `busiest`: all packs of a data-parallel rank; `largest`:
    the most expensive pack of all."""

    mean: Load
    busiest: Load
    largest: Load


@dataclass(frozen=True)
class _Sequence:
    tokens: int
    pairs: float
    rows: int
    cost: int


@dataclass
class Batch:
    """A step's sequences and how they are spread, for any layout. Spreads are kept, since many layouts share them."""

    shape: ModelShape
    workload: Workload
    flops: FlopsModel = field(init=False)
    _spreads: dict[tuple[int, int, int], tuple[Spread, Spread]] = field(init=False, default_factory=dict)
    _assigned: dict[int, list[list[int]]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        work = self.workload
        self.flops = flops_model(self.shape)
        all_lengths = lengths.quantiles(work.responses, work.rollouts)
        # Every n-th response from the longest on stands for one of n mini-batches: all have about the same work.
        chosen = all_lengths[::-1][:: work.mini_batches]
        self._student = [self._sequence(work.prompt, n) for n in chosen]
        self._teacher = [self._sequence(work.prompt + work.privileged, n) for n in chosen]

    def _sequence(self, prompt: float, response: int) -> _Sequence:
        tokens = round(prompt) + response
        windows = Counter(self.flops.windows)
        pairs = sum(n * attending_pairs([(0, tokens)], w) for w, n in windows.items()) / self.shape.layers
        cost = forward_flops(self.flops, PackCounts(((0, tokens),), response))
        return _Sequence(tokens, pairs, response, cost)

    def model_flops(self) -> float:
        """Of a complete step, as `perf/mfu` counts them: scoring passes once, an update three times."""
        work = self.workload
        student = work.student + work.reference + UPDATE * work.epochs
        own = sum(s.cost for s in self._student) * student + sum(s.cost for s in self._teacher) * work.teacher
        return float(own) * work.mini_batches

    def tokens(self) -> float:
        """Of all passes of a step."""
        work = self.workload
        student = work.student + work.reference + work.epochs
        own = sum(s.tokens for s in self._student) * student + sum(s.tokens for s in self._teacher) * work.teacher
        return float(own) * work.mini_batches

    def generated(self) -> float:
        """Response tokens of a step."""
        return float(sum(s.rows for s in self._student)) * self.workload.updates

    def spread(self, training: Training) -> tuple[Spread, Spread]:
        """(of the student's sequences, of the teacher's) in one mini-batch."""
        layout = training.layout
        stages = layout.pipeline if layout.virtual_pipeline else -layout.pipeline  # whether packs come in rounds
        key = (layout.data, training.pack, stages)
        found = self._spreads.get(key)
        if found is None:
            members = self._members(layout.data)
            found = self._spreads[key] = (
                _spread(self._student, members, training.pack, stages),
                _spread(self._teacher, members, training.pack, stages),
            )
        return found

    def _members(self, ranks: int) -> list[list[int]]:
        """Which sequences each data-parallel rank has."""
        if ranks not in self._assigned:
            work = self.workload
            student = work.student + work.reference + UPDATE * work.epochs
            costs = [
                (student * s.cost, t.cost * work.teacher) for s, t in zip(self._student, self._teacher, strict=True)
            ]
            self._assigned[ranks] = [list(range(len(costs)))] if ranks == 1 else assign(costs, ranks)
        return self._assigned[ranks]


def _spread(sequences: Sequence[_Sequence], members: Sequence[Sequence[int]], pack: int, stages: int) -> Spread:
    """stages: of the pipeline, negative where packs need not come in rounds of as many."""
    owned = [[sequences[i] for i in own] for own in members]
    # All ranks have as many packs as the rank with the most tokens needs; its first fit counts.
    fullest = max(owned, key=lambda own: sum(s.tokens for s in own))
    packs = max(len(first_fit([s.tokens for s in fullest], pack)), abs(stages), 1)
    if stages > 1:
        packs = math.ceil(packs / stages) * stages
    busiest = max(owned, key=lambda own: sum(s.cost for s in own))
    total = _load([s for own in owned for s in own], packs * len(members))
    longest = max(sequences, key=lambda s: s.cost)
    load = _load(busiest, packs)
    # A pack has at least the longest sequence, or an equal part of its rank's.
    alone = longest.cost >= sum(s.cost for s in busiest) / packs
    return Spread(
        mean=total * (1 / len(members)),
        busiest=load,
        largest=_load([longest], 1) if alone else load * (1 / packs),
    )


def _load(sequences: Sequence[_Sequence], packs: int) -> Load:
    return Load(
        tokens=sum(s.tokens for s in sequences),
        pairs=sum(s.pairs for s in sequences),
        rows=sum(s.rows for s in sequences),
        packs=packs,
    )

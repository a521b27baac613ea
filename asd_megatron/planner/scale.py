"""How a step's time falls with the number of GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from asd_megatron.errors import UserError
from asd_megatron.planner.proposals import Proposal, propose
from asd_megatron.planner.setting import Setting


@dataclass(frozen=True)
class ScalePoint:
    """efficiency: the speed of the smallest size times the growth over the speed that was reached, so 1 is linear."""

    gpus: int
    proposal: Proposal
    efficiency: float

    @property
    def seconds(self) -> float:
        return self.proposal.time.total


def curve(setting: Setting, gpus: Sequence[int]) -> list[ScalePoint]:
    """The best proposal at each number of GPUs, those left out on which nothing fits."""
    found: list[ScalePoint] = []
    for count in sorted(gpus):
        try:
            best = propose(setting, count, top=1)[0]
        except UserError:
            continue
        first = found[0] if found else ScalePoint(count, best, 1.0)
        efficiency = first.seconds * first.gpus / (best.time.total * count)
        found.append(ScalePoint(count, best, efficiency))
    return found

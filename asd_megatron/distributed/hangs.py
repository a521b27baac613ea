"""Which rank hangs, from what all ranks report once a second.

A rank that waits for another makes no progress either, so the time since its own last progress says nothing. Asked is
the rank that the others wait for:

    rank   phase    position  collectives of tp   main thread
    0      update   41        7                   in all_reduce        waits for rank 1
    1      update   41        6                   in forward           behind: not yet in the group's seventh collective
    2      update   42        ...                 in broadcast         waits for both, whose position is lower

Behind is a rank with a lower position, or with the same one and fewer collectives of a group that both are in. Of the
ranks that are behind none, those whose main thread is not in a call of torch.distributed count first; if all are in
one, all are named. The run hangs when such a rank has made no progress for the time-out of its own phase, and the
others have waited for it for some beats: when rank 0 has just ended a long work that all others waited for, their
reports are a little older than its own, and show them behind it, without progress for as long as that work took.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from asd_megatron.distributed.activity import Phase, Report

SETTLED_BEATS = 5
"""For which the others have to wait for a rank that hangs: reports arrive meanwhile, on a busy machine too."""
Limits = Mapping[Phase, float | None]
"""By phase: seconds without progress; None: no bound."""


@dataclass(frozen=True)
class Hang:
    """The ranks that hang, in one phase, and the time-out of that phase, which has passed."""

    ranks: tuple[int, ...]
    phase: Phase
    seconds: float


class HangRule:
    """Finds hanging ranks of `world` from their reports, which come every `beat` seconds."""

    def __init__(self, world: int, limits: Limits, beat: float) -> None:
        self._limits, self._beat = limits, beat
        self._seen: list[tuple[int, int] | None] = [None] * world
        self._still = [0] * world  # beats since a rank's last progress
        self._awaited = [0] * world  # beats for which the others have waited for a rank

    def look(self, reports: Sequence[Report]) -> Hang | None:
        """The newest reports, by rank. Beats are counted, not seconds: a pause of this process is nobody's hang."""
        for rank, report in enumerate(reports):
            progress = (report.position, report.marks)
            self._still[rank] = self._still[rank] + 1 if self._seen[rank] == progress else 0
            self._seen[rank] = progress
        awaited = waited_for(reports)
        self._awaited = [beats + 1 if rank in awaited else 0 for rank, beats in enumerate(self._awaited)]
        late = [rank for rank in awaited if self._overdue(rank, reports[rank])]
        if not late:
            return None
        phase = reports[late[0]].phase
        ranks = tuple(rank for rank in late if reports[rank].phase == phase)
        return Hang(ranks, phase, self._limits[phase] or 0.0)

    def _overdue(self, rank: int, report: Report) -> bool:
        limit = self._limits.get(report.phase)
        settled = self._awaited[rank] >= SETTLED_BEATS
        return limit is not None and settled and self._still[rank] * self._beat >= limit


def waited_for(reports: Sequence[Report]) -> list[int]:
    """The ranks that are behind no other rank, as the module says."""
    last = min(report.position for report in reports)
    ranks = [rank for rank, report in enumerate(reports) if report.position == last]
    begun: dict[str, int] = {}  # by group: the fewest collectives of one of `ranks`
    for rank in ranks:
        for group, count in reports[rank].collectives.items():
            begun[group] = min(count, begun.get(group, count))
    first = [r for r in ranks if all(count == begun[group] for group, count in reports[r].collectives.items())]
    first = first or ranks
    return [rank for rank in first if not reports[rank].waiting] or first

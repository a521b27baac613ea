"""What a fault of the drill is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from asd_megatron.checks.drill.disturbance import Verdict
from asd_megatron.checks.drill.world import World
from asd_megatron.checks.ranks import CheckError


class NotPossible(CheckError):
    """This machine does not allow the fault."""


LINE = 160  # characters of the program's output in a table


@dataclass(frozen=True)
class Fault:
    """`act(world, name)` does `what` to the run `name`; `expected` says what is right then."""

    what: str
    expected: str
    act: Callable[[World, str], Verdict]


def brief(line: str) -> str:
    return line if len(line) <= LINE else line[: LINE - 3] + "..."

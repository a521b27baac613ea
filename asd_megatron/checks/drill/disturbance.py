"""One disturbed run: a fault at a moment of it, its end, and the same command again."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from asd_megatron.checks.drill.program import Ended, Program
from asd_megatron.checks.drill.sabotage import Act, Phase, Sabotage
from asd_megatron.checks.drill.world import Sections, World, newest, tokens, weights_equal

FAULT_STEP = 3


@dataclass(frozen=True)
class Verdict:
    """What a fault did. seconds: from the fault to the end of the disturbed program (None: it went on).

    tokens_lost: response tokens of steps that were complete before the step in hand and had to be drawn again.
    weights_equal: the resumed run ended with the weights, moments and metrics of an undisturbed one, bit for bit; None
    where that is not to be expected, as `happened` says.
    """

    passed: bool
    happened: str
    seconds: float | None = None
    tokens_lost: int = 0
    weights_equal: bool | None = None


@dataclass(frozen=True)
class Disturbance:
    """`act` in `phase` of step FAULT_STEP on rank `rank`; with `signal` (and act `wait`), that signal `to` the
    launcher or the process group meanwhile. sections: recipe keys."""

    phase: Phase
    act: Act = "wait"
    rank: int | None = 1
    signal: signal.Signals | None = None
    to: str = "launcher"
    layout: str = "tp2"
    sections: Sections = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """ended: the disturbed program. kept: step of the newest complete checkpoint after it. lost, equal: as in
    `Verdict`."""

    ended: Ended
    kept: int
    lost: int
    equal: bool


def disturb(
    world: World, name: str, disturbance: Disturbance, meanwhile: Callable[[Program], None] | None = None
) -> Outcome:
    """Run it, and then the same command without the fault, to its end. meanwhile: done at the moment of the fault.
    Raises CheckError where the moment does not come, the program does not end, or the second start fails."""
    d = disturbance
    ended = disturb_once(world, name, d, meanwhile)
    run = world.run_folder(name)
    learned, kept = tokens(run), newest(run)
    world.complete(world.recipe(name, d.layout, d.sections))
    return Outcome(ended, kept, tokens_lost(learned, kept), weights_equal(run, world.undisturbed(d.layout)))


def disturb_once(
    world: World, name: str, disturbance: Disturbance, meanwhile: Callable[[Program], None] | None = None
) -> Ended:
    """The disturbed program alone."""
    d = disturbance
    recipe = world.recipe(name, d.layout, d.sections)
    sabotage = Sabotage(d.phase, FAULT_STEP, d.rank, d.act, str(world.folder / f"{name}.marker"))
    with Program([str(recipe)], world.folder / f"{name}.log", sabotage) as program:
        program.struck()
        if meanwhile is not None:
            meanwhile(program)
        if d.signal is not None:
            program.signal(d.signal, d.to)
        program.release()
        return program.ended()


def judged(conditions: Mapping[str, bool], happened: str, outcome: Outcome) -> Verdict:
    """A verdict on a resumed run; `conditions`: what else must hold, by name."""
    return verdict(conditions, happened, outcome.ended.seconds, outcome.lost, equal=outcome.equal)


def verdict(
    conditions: Mapping[str, bool], happened: str, seconds: float | None = None, lost: int = 0, *, equal: bool
) -> Verdict:
    """A verdict on a run that has to lose no token and to end as an undisturbed one. `conditions`: what else must hold,
    by name. Those that do not are named."""
    held = {**conditions, "no token lost": lost == 0, "equal to an undisturbed run": equal}
    unmet = [name for name, holds in held.items() if not holds]
    text = happened + (f"; NOT: {', '.join(unmet)}" if unmet else "")
    return Verdict(not unmet, text, seconds, lost, equal)


def tokens_lost(learned: Mapping[int, int], kept: int) -> int:
    """Tokens of complete steps before FAULT_STEP that the checkpoint of step `kept` does not have. learned: by step."""
    return sum(count for step, count in learned.items() if kept < step < FAULT_STEP)

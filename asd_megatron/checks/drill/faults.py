"""The faults of the drill, by name."""

from __future__ import annotations

import signal
from collections.abc import Callable

from asd_megatron.checks.drill import servers, storage
from asd_megatron.checks.drill.disturbance import FAULT_STEP, Disturbance, Verdict, disturb, disturb_once, judged
from asd_megatron.checks.drill.fault import Fault, brief
from asd_megatron.checks.drill.program import Program
from asd_megatron.checks.drill.sabotage import Phase
from asd_megatron.checks.drill.world import STEPS, World, newest, weights_equal
from asd_megatron.observe.writer import read_metrics

PHASES: tuple[Phase, ...] = ("rollout", "scoring", "update", "save")
HUNG_SECONDS = 10
REQUESTS = {
    "sigterm": (signal.SIGTERM, "launcher", "SIGTERM to the launcher"),
    "sigusr1": (signal.SIGUSR1, "launcher", "SIGUSR1 to the launcher (Slurm's warning)"),
    "ctrl_c": (signal.SIGINT, "group", "Ctrl-C in the terminal"),
}
STOPPED = "status 0, state of a complete step saved, one line says where to go on; resumed bit for bit"
LOST = "all ranks end, one line names the rank and how it ended; resumed bit for bit"


def _request(phase: Phase, number: signal.Signals, to: str) -> Callable[[World, str], Verdict]:
    def act(world: World, name: str) -> Verdict:
        outcome = disturb(world, name, Disturbance(phase, signal=number, to=to))
        lines = outcome.ended.lines("stopped at step")
        said = lines[0] if lines else outcome.ended.tail[-200:]
        conditions = {
            "status 0": outcome.ended.status == 0,
            "one line": len(lines) == 1 and "continue with" in said,
            "no traceback": "Traceback" not in outcome.ended.output,
        }
        happened = f"status {outcome.ended.status}; {brief(said)}; checkpoint of step {outcome.kept}"
        return judged(conditions, happened, outcome)

    return act


def _lost(disturbance: Disturbance, words: tuple[str, ...], seconds: float) -> Callable[[World, str], Verdict]:
    """The run ends with one error line that holds all `words`, within `seconds` of the fault."""

    def act(world: World, name: str) -> Verdict:
        outcome = disturb(world, name, disturbance)
        ended, lines = outcome.ended, outcome.ended.lines("error")
        conditions = {
            "a status that says so": ended.status != 0,
            "one error line": len(lines) == 1,
            f"which says {' and '.join(words)}": any(all(word in line for word in words) for line in lines),
            f"within {seconds:.0f} s": ended.seconds <= seconds,
        }
        said = brief(lines[0]) if lines else "no error line"
        return judged(conditions, f"status {ended.status}; {said}; checkpoint of step {outcome.kept}", outcome)

    return act


def _raised(world: World, name: str) -> Verdict:
    outcome = disturb(world, name, Disturbance("scoring", "raise"))
    ended = outcome.ended
    conditions = {
        "status 1": ended.status == 1,
        "the rank is named": "rank 1" in ended.output,
        "one traceback": ended.output.count("the drill's error on rank 1") == 1,
    }
    return judged(conditions, f"status {ended.status}; rank 1's traceback, once", outcome)


def _launcher_killed(world: World, name: str) -> Verdict:
    outcome = disturb(world, name, Disturbance("update", signal=signal.SIGKILL))
    happened = f"the ranks ended {outcome.ended.seconds:.1f} s later; checkpoint of step {outcome.kept}"
    return judged({"the ranks end too": outcome.ended.seconds <= 30}, happened, outcome)


def _two_runs(world: World, name: str) -> Verdict:
    second: list[str] = []

    def start_again(program: Program) -> None:
        with Program([str(world.recipe(name))], world.folder / f"{name}.second.log") as other:
            ended = other.ended()
        second.extend([str(ended.status), *ended.lines("error")])

    ended = disturb_once(world, name, Disturbance("update"), start_again)
    equal = weights_equal(world.run_folder(name), world.undisturbed("tp2"))
    refused = second[0] == "2" and len(second) == 2 and "in use" in second[1]
    happened = f"the second: status {second[0]}, {brief(second[-1])}; the first: status {ended.status}"
    return Verdict(refused and ended.status == 0 and equal, happened, None, 0, equal)


def _not_a_number(world: World, name: str) -> Verdict:
    ended = disturb_once(world, name, Disturbance("update", "nan"))
    run = world.run_folder(name)
    skipped = [row["step"] for row in read_metrics(run) if row["optimizer/skipped"]]
    passed = ended.status == 0 and skipped == [FAULT_STEP] and newest(run) == STEPS
    happened = f"status {ended.status}; skipped updates of steps {skipped}; all later ones applied"
    return Verdict(passed, happened + "; other weights than without the fault, by design", None)


def _all() -> dict[str, Fault]:
    kill_words = ("rank 1",)
    faults = {
        f"kill_in_{phase}": Fault(
            f"SIGKILL of rank 1 in {phase}", LOST, _lost(Disturbance(phase, "kill"), kill_words, 60)
        )
        for phase in PHASES
    }
    for short, (number, to, text) in REQUESTS.items():
        for phase in PHASES:
            faults[f"{short}_in_{phase}"] = Fault(f"{text} in {phase}", STOPPED, _request(phase, number, to))
    hanging = {"run": {"timeout": {"scoring": HUNG_SECONDS}}}
    silent = {"run": {"lost_rank_timeout": HUNG_SECONDS}}
    return (
        faults
        | {
            "launcher_killed": Fault(
                "SIGKILL of the launcher", "the ranks end within seconds; resumed bit for bit", _launcher_killed
            ),
            "rank_stopped": Fault(
                "SIGSTOP of rank 1",
                f"named after run.lost_rank_timeout ({HUNG_SECONDS} s); resumed bit for bit",
                _lost(Disturbance("update", "stop", sections=silent), kill_words, HUNG_SECONDS + 60),
            ),
            "collective_hangs": Fault(
                "rank 1 never joins a collective",
                f"rank, phase and operation named after run.timeout ({HUNG_SECONDS} s); resumed bit for bit",
                _lost(Disturbance("scoring", "hang", sections=hanging), ("rank 1", "scoring"), HUNG_SECONDS + 60),
            ),
            "error_on_one_rank": Fault(
                "an exception on rank 1", "status 1, its traceback alone, the rank named; resumed bit for bit", _raised
            ),
            **{
                f"bit_flip_{layout}": Fault(
                    f"one bit of a weight flipped on rank 1, {text}",
                    "found before the next checkpoint, tensor and rank named, nothing saved; resumed bit for bit",
                    _lost(Disturbance("update", "flip", layout=layout), ("rank 1", "norm"), 60),
                )
                for layout, text in (("dp2", "data parallelism 2"), ("tp2", "tensor parallelism 2"))
            },
            "nan_on_one_rank": Fault(
                "NaN in a gradient of rank 1", "that update is skipped on all ranks, the run continues", _not_a_number
            ),
            "two_runs_in_one_folder": Fault(
                "the same command twice at once", "the second is refused, the first continues", _two_runs
            ),
        }
        | storage.faults()
        | servers.faults()
    )


FAULTS = _all()

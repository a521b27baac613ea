"""The fault drill: every fault in turn, its outcome on the console, as JSON and in the page docs/reliability.md."""

from __future__ import annotations

import signal
import tempfile
import textwrap
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from asd_megatron.checks.drill.disturbance import Verdict
from asd_megatron.checks.drill.fault import NotPossible
from asd_megatron.checks.drill.faults import FAULTS
from asd_megatron.checks.drill.world import World
from asd_megatron.checks.ranks import CheckError
from asd_megatron.errors import UserError, did_you_mean
from asd_megatron.files import atomic_write, write_json

BEGIN = "<!-- measured: begin (asd-megatron drill --write) -->"
END = "<!-- measured: end -->"


@dataclass(frozen=True)
class Result:
    """The outcome of one fault; `possible`: whether this machine allows it."""

    fault: str
    what: str
    expected: str
    verdict: Verdict
    possible: bool = True

    def to_json(self) -> dict[str, Any]:
        row = {"fault": self.fault, "what": self.what, "expected": self.expected, **asdict(self.verdict)}
        return row if self.possible else {**row, "passed": None}

    @property
    def mark(self) -> str:
        return ("ok" if self.verdict.passed else "FAILED") if self.possible else "not possible here"


def listing() -> str:
    """All faults with what is expected."""
    width = max(map(len, FAULTS))
    return "\n".join(f"{name:<{width}}  {fault.what}: {fault.expected}" for name, fault in FAULTS.items())


def main(names: Sequence[str], *, json_file: Path | None, page: Path | None, folder: Path | None) -> int:
    """Try the faults (all without names), printing each as it is known; the exit status is 1 if one failed. Raises
    UserError for an unknown name and for a page without the markers of its table."""
    for name in names:
        if name not in FAULTS:
            raise UserError(
                f"no fault {name!r}: {did_you_mean(name, FAULTS) or 'asd-megatron drill --list names them'}"
            )
    before = None if page is None else _halves(page)
    for ignored in (signal.SIGINT, signal.SIGHUP):  # in a shell's background and under nohup, and then inherited
        if signal.getsignal(ignored) is signal.SIG_IGN:
            signal.signal(ignored, signal.SIG_DFL)
    chosen = list(names) or list(FAULTS)
    with ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="asd_megatron_drill_")))
        folder.mkdir(parents=True, exist_ok=True)
        world = World(folder.resolve())
        results = []
        for number, name in enumerate(chosen, 1):
            print(f"[{number}/{len(chosen)}] {name}: {FAULTS[name].what}", flush=True)
            results.append(_try(world, name))
            print(textwrap.indent(f"{results[-1].mark}: {results[-1].verdict.happened}", "    "), flush=True)
    if json_file is not None:
        write_json(json_file, {"faults": [result.to_json() for result in results]})
    if page is not None and before is not None:
        atomic_write(page, f"{before[0]}{BEGIN}\n{table(results)}\n{END}{before[1]}")
    failed = [result.fault for result in results if result.mark == "FAILED"]
    print(f"{len(results)} faults, {len(failed)} failed{': ' + ', '.join(failed) if failed else ''}")
    return 1 if failed else 0


def _try(world: World, name: str) -> Result:
    fault = FAULTS[name]
    try:
        return Result(name, fault.what, fault.expected, fault.act(world, name))
    except NotPossible as reason:
        return Result(name, fault.what, fault.expected, Verdict(False, str(reason)), possible=False)
    except CheckError as error:
        return Result(name, fault.what, fault.expected, Verdict(False, str(error)))


def table(results: Sequence[Result]) -> str:
    """The results as a table of the page."""
    lines = ["| fault | expected | happened | s | tokens lost | equal |", "| --- | --- | --- | --- | --- | --- |"]
    for result in results:
        v = result.verdict
        seconds = "" if v.seconds is None else f"{v.seconds:.1f}"
        equal = {True: "bit for bit", False: "no", None: ""}[v.weights_equal]
        happened = f"{result.mark}: {v.happened}".replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {result.what} | {result.expected} | {happened} | {seconds} | {v.tokens_lost} | {equal} |")
    return "\n".join(lines)


def _halves(page: Path) -> tuple[str, str]:
    """What stands before and after the page's table."""
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    if BEGIN not in text or END not in text:
        raise UserError(f"{page} has no table to replace: put the lines {BEGIN} and {END} where it belongs")
    return text[: text.index(BEGIN)], text[text.index(END) + len(END) :]

"""Runs the hostile programs of `attacks.py` in the sandbox and says what became of them."""

from __future__ import annotations

import os
import secrets
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from asd_megatron.sandbox.attack import ESCAPED, PRELUDE, Attack
from asd_megatron.sandbox.attacks import ATTACKS
from asd_megatron.sandbox.launch import Interpreter, Protections, SandboxLimits
from asd_megatron.sandbox.pool import SandboxPool, Status, TestedProgram, TestResult

CHECK_LIMITS = SandboxLimits(
    cpu_seconds=0.5, wall_seconds=30.0, memory_bytes=256 << 20, processes=8, file_bytes=16 << 20, output_bytes=1 << 20
)
WAITING_SECONDS = 1.0  # of wall time, for attacks that nothing but this limit ends


@dataclass(frozen=True)
class AttackOutcome:
    """What became of an attack: `harm` says what it achieved, and is empty if it was stopped."""

    attack: Attack
    results: Sequence[TestResult]
    harm: str


@dataclass(frozen=True)
class _World:
    """What an attack may be after: see `attack.PRELUDE`."""

    canary: Path
    listeners: Sequence[socket.socket]
    abstract: str

    def program(self, attack: Attack) -> str:
        return (
            PRELUDE.format(
                canary=str(self.canary),
                socket=str(self.canary.with_name("socket")),
                port=self.listeners[0].getsockname()[1],
                abstract=self.abstract,
                parent=os.getpid(),
            )
            + attack.program
        )

    def reached(self) -> bool:
        """Whether a program has sent anything to one of the listeners."""
        for listener in self.listeners:
            try:
                listener.accept() if listener.type == socket.SOCK_STREAM else listener.recv(1)
                return True
            except BlockingIOError:
                continue
        return False


@contextmanager
def _world() -> Iterator[_World]:
    """Files and sockets that anybody may use, a secret in the environment and an open file."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="asd_megatron_check_")))
        folder.chmod(0o777)  # so that the sandbox, not the file system, is what protects
        canary = folder / "canary"
        canary.write_text("alive")
        canary.chmod(0o666)
        abstract = f"asd_megatron_{secrets.token_hex(8)}"
        listeners = [socket.create_server(("127.0.0.1", 0))]
        listeners.append(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        listeners[1].bind(("127.0.0.1", listeners[0].getsockname()[1]))
        for address in (str(folder / "socket"), "\0" + abstract):
            listeners.append(socket.socket(socket.AF_UNIX))
            listeners[-1].bind(address)
            listeners[-1].listen()
        (folder / "socket").chmod(0o777)
        for listener in listeners:
            stack.enter_context(listener)
            listener.setblocking(False)
        inherited = os.open(canary, os.O_RDWR)
        stack.callback(os.close, inherited)
        os.set_inheritable(inherited, True)
        os.environ["ASD_MEGATRON_CHECK_SECRET"] = "secret"  # noqa: S105 (it is for the attack to find)
        stack.callback(os.environ.pop, "ASD_MEGATRON_CHECK_SECRET")
        yield _World(canary, listeners, abstract)


def run_attacks(
    interpreter: Interpreter,
    protections: Protections,
    *,
    attacks: Sequence[Attack] | None = None,
    workers: int = 2,
) -> list[AttackOutcome]:
    """Run the attacks (None: all), each in a sandbox of its own."""
    attacks = ATTACKS if attacks is None else attacks
    outcomes: list[AttackOutcome] = []
    with _world() as world:
        for wall_seconds, some in _by_patience(attacks):
            limits = replace(CHECK_LIMITS, wall_seconds=wall_seconds)
            pool = SandboxPool(interpreter, limits, size=workers, protections=protections)
            programs = [TestedProgram(world.program(attack), attack.tests) for attack in some]
            found = zip(some, pool.run(programs), strict=True)
            outcomes += [
                AttackOutcome(attack, results or (), _harm(attack, results or ())) for attack, results in found
            ]
        general = _general_harm(world)
        if outcomes and general:
            outcomes[-1] = replace(outcomes[-1], harm=f"this or another attack: {general}")
    return sorted(outcomes, key=lambda outcome: attacks.index(outcome.attack))


def _by_patience(attacks: Sequence[Attack]) -> Iterator[tuple[float, list[Attack]]]:
    """The attacks in two parts, each with its limit on wall time."""
    waiting = [attack for attack in attacks if attack.expected == {Status.WALL_TIME}]
    yield WAITING_SECONDS, waiting
    yield CHECK_LIMITS.wall_seconds, [attack for attack in attacks if attack not in waiting]


def _harm(attack: Attack, results: Sequence[TestResult]) -> str:
    if len(results) != len(attack.tests):
        return "its tests were not run to the end"
    for result in results:
        text = result.stdout.decode(errors="replace")
        if ESCAPED in text:
            return text[text.index(ESCAPED) :].splitlines()[0][:200]
        if result.status not in attack.expected:
            return f"a test ended with {result.status} (detail {result.detail}): {result.stderr[-200:]}"
    return ""


def _general_harm(world: _World) -> str:
    if not world.canary.exists() or world.canary.read_text() != "alive":
        return "a file outside was changed"
    if world.reached():
        return "a socket outside was reached"
    left = leftover_processes()
    return f"processes were left: {left}" if left else ""


def leftover_processes() -> list[int]:
    """Processes of sandboxes that this process has started and that still run."""
    ending = f"supervisor.py\0--of\0{os.getpid()}\0".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if (entry / "cmdline").read_bytes().endswith(ending):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def attack_table() -> str:
    """The table of docs/sandbox.md."""
    rows = [f"| {a.name} | {a.stopped_by} | {', '.join(sorted(f'`{s}`' for s in a.expected))} |" for a in ATTACKS]
    return "\n".join(["| attack | what stops it | how its test ends |", "|---|---|---|", *rows])

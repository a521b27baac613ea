"""Hostile programs. Needs bubblewrap: apt-get install bubblewrap."""

from __future__ import annotations

from pathlib import Path

import pytest

from asd_megatron.cli.main import main
from asd_megatron.sandbox import check
from asd_megatron.sandbox.attack import Attack
from asd_megatron.sandbox.attacks import ATTACKS
from asd_megatron.sandbox.check import AttackOutcome, attack_table, leftover_processes, run_attacks
from asd_megatron.sandbox.launch import Interpreter, Protections, find_interpreter
from asd_megatron.sandbox.probe import usable_protections

PAGE = Path(__file__).parents[2] / "docs" / "sandbox.md"


@pytest.fixture(scope="module")
def interpreter() -> Interpreter:
    found = find_interpreter()
    assert usable_protections(found)[1] == [], "these tests need the complete sandbox; what is missing is said here"
    return found


@pytest.fixture(scope="module")
def outcomes(interpreter: Interpreter) -> dict[str, AttackOutcome]:
    return {outcome.attack.name: outcome for outcome in run_attacks(interpreter, Protections())}


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_attack(outcomes: dict[str, AttackOutcome], attack: Attack) -> None:
    """What it wanted it did not get, a verdict was counted, and nothing of it is left on the machine."""
    outcome = outcomes[attack.name]
    assert outcome.harm == ""
    assert len(outcome.results) == len(attack.tests)


def test_nothing_is_left(outcomes: dict[str, AttackOutcome]) -> None:
    assert leftover_processes() == []


def test_the_attacks_would_succeed_elsewhere(interpreter: Interpreter) -> None:
    """The harmless ones of them, outside the sandbox and in one without its filter."""

    def named(*parts: str) -> list[Attack]:
        return [attack for attack in ATTACKS if any(part in attack.name for part in parts)]

    outside = named("secrets", "/proc of", "TCP", "by path and abstract")
    found = run_attacks(interpreter, Protections(False, False), attacks=outside)
    assert [outcome.harm.startswith(("ESCAPED", "this or")) for outcome in found] == [True] * len(outside), found
    unfiltered = run_attacks(interpreter, Protections(True, False), attacks=named("TCP", "memfd"))
    assert all(outcome.harm.startswith("ESCAPED") for outcome in unfiltered), unfiltered


def test_the_page_has_the_table() -> None:
    assert attack_table() in PAGE.read_text(encoding="utf-8"), "asd-megatron sandbox table prints it"


def test_the_command(
    interpreter: Interpreter, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sandbox", "table"]) == 0 and attack_table() in capsys.readouterr().out
    some = [attack for attack in ATTACKS if "links" in attack.name]
    monkeypatch.setattr(check, "ATTACKS", some)
    assert main(["sandbox", "check"]) == 0
    assert "1 of 1 attacks were stopped, 0 protections are missing" in capsys.readouterr().out
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["sandbox", "check"]) == 1
    out = capsys.readouterr().out
    assert "missing: namespaces" in out and "the attacks are not run" in out

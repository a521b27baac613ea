"""`asd-megatron sandbox check [--python PATH]`, `asd-megatron sandbox table`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Say which protections this machine gives to programs that a model wrote, and attack them; returns 1 if one is
    missing or an attack succeeds."""
    from asd_megatron.sandbox.attacks import ATTACKS
    from asd_megatron.sandbox.check import attack_table, run_attacks
    from asd_megatron.sandbox.launch import find_interpreter, sandbox_user
    from asd_megatron.sandbox.probe import usable_protections

    parser = argparse.ArgumentParser(
        prog="asd-megatron sandbox",
        description=(
            "Check the sandbox of `reward.name: code` on this machine (docs/sandbox.md). Takes about 20 seconds."
        ),
    )
    parser.add_argument("action", choices=("check", "table"), help="check: probe and attack; table: list the attacks")
    parser.add_argument("--python", metavar="PATH", help="interpreter of tested programs (as reward.code.python)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="sandboxes at a time (default: 2)")
    arguments = parser.parse_args(argv)
    if arguments.action == "table":
        print(attack_table())
        return 0
    interpreter = find_interpreter(arguments.python)
    user = sandbox_user()
    print(f"interpreter: {interpreter.executable}" + ("" if user is None else f", run as user {user}"))
    protections, missing = usable_protections(interpreter)
    for lack in missing:
        print(f"missing: {lack.protection}\n    {lack.remedy}")
    if not protections.namespaces:
        print("the attacks are not run: they would reach this machine")
        return 1
    outcomes = run_attacks(interpreter, protections, workers=max(arguments.workers, 1))
    width = max(len(attack.name) for attack in ATTACKS)
    for outcome in outcomes:
        ended = ", ".join(dict.fromkeys(result.status for result in outcome.results))
        print(f"{outcome.attack.name:<{width}}  {f'HARM: {outcome.harm}' if outcome.harm else f'stopped ({ended})'}")
    harmful = sum(bool(outcome.harm) for outcome in outcomes)
    print(f"{len(outcomes) - harmful} of {len(outcomes)} attacks were stopped, {len(missing)} protections are missing")
    return int(bool(harmful or missing))

"""The page of tasks is the one that the installed package and the findings make."""

from __future__ import annotations

from pathlib import Path

import pytest

from asd_megatron.gym.page import render
from asd_megatron.gym.tasks import findings, registry

PAGE = Path(__file__).parents[2] / "docs" / "reasoning_gym_tasks.md"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(), "run `make docs`"


def test_the_page_names_every_task_once() -> None:
    usable, refused = render().split("## Refused")
    for task in registry():
        here, there = (refused, usable) if "unusable" in findings().get(task, {}) else (usable, refused)
        assert here.count(f"\n| `{task}` |") == 1 and f"\n| `{task}` |" not in there


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_findings_are_true() -> None:
    from tools.sweep_reasoning_gym import sweep

    def lasting(found: dict[str, dict[str, object]]) -> dict[str, dict[str, object]]:
        return {task: {k: v for k, v in about.items() if k != "slow"} for task, about in found.items()}

    assert lasting(sweep(sorted(registry()))) == lasting(findings())  # type: ignore[arg-type]

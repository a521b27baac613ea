"""Recorded rollouts served again."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from asd_megatron.errors import UserError
from asd_megatron.observe.dumps import dump_path, write_dump
from asd_megatron.records import Example, FinishReason, Rollout, SamplingParams, TokenTable
from asd_megatron.rollout.replay import ReplayEngine
from tests.rollout.toy import ToyTokenizer, prompt

PROMPTS = [prompt("a", (1, 2)), prompt("b", (3,)), prompt("c", (4, 5, 6))]
PARAMS = SamplingParams(n=2, temperature=0.7)


def _rollouts() -> list[Rollout]:
    return [
        Rollout(
            p.problem.prompt_id,
            sample,
            p.ids,
            tuple(range(1, 2 + sample)),
            (-0.25,) * (1 + sample),
            FinishReason.LENGTH if sample else FinishReason.STOP,
            weight_version=6,
            loss_mask=(False,) + (True,) * sample,
        )
        for sample in (1, 0)
        for p in reversed(PROMPTS)
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rollouts = _rollouts()
    examples = [Example(r, reward=1.0, group_advantage=0.0) for r in rollouts]
    path = dump_path(tmp_path, 7)
    path.parent.mkdir()
    write_dump(
        path,
        examples,
        TokenTable.for_lengths([len(r.response_ids) for r in rollouts]),
        step=7,
        lam=0.5,
        H=None,
        h_warm=None,
        temperature=0.7,
        recipe_hash="x",
    )
    return tmp_path


@pytest.mark.parametrize("given", [".", "rollouts", "copied"])
def test_serves_what_was_recorded_in_the_order_asked(folder: Path, process_groups: Any, given: str) -> None:
    if given == "copied":
        (folder / "rollouts").rename(folder / given)
    engine = ReplayEngine(folder / given, process_groups, ToyTokenizer())
    engine.submit(PROMPTS, PARAMS, 7)
    assert engine.pending == 3
    found = engine.collect(1)
    assert engine.pending == 0 and engine.collect(1) == []
    assert [g.problem for g in found] == [p.problem for p in PROMPTS]
    recorded = {(r.prompt_id, r.sample): r for r in _rollouts()}
    for group in found:
        assert [r.sample for r in group.rollouts] == [0, 1]
        for r in group.rollouts:
            assert r.text == "ab"[: r.sample + 1]
            assert dataclasses.replace(r, text="") == recorded[r.prompt_id, r.sample]


def test_refuses_what_was_not_recorded(folder: Path, process_groups: Any) -> None:
    engine = ReplayEngine(folder, process_groups, None)
    other_ids = [*PROMPTS[:2], prompt("c", (4, 5, 7))]
    cases = [
        (PROMPTS, PARAMS, 8, "step_000008.*does not exist"),
        (PROMPTS, PARAMS, -1, "no evaluation rollouts"),
        (PROMPTS[:2], PARAMS, 7, r"0 are missing.*1 are not asked for \(c\)"),
        ([*PROMPTS[:2], prompt("d", (4,))], PARAMS, 7, r"1 are missing from it \(d\)"),
        (other_ids, PARAMS, 7, "problem c has other token ids"),
        (PROMPTS, dataclasses.replace(PARAMS, n=3), 7, "rollouts_per_problem"),
        (PROMPTS, dataclasses.replace(PARAMS, temperature=1.0), 7, "temperature 0.7"),
    ]
    for prompts, params, step, message in cases:
        engine.submit(prompts, params, step)
        with pytest.raises(UserError, match=message):
            engine.collect(1)
        assert engine.pending == 0


def test_refuses_a_folder_without_dumps(tmp_path: Path, process_groups: Any) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match="replay_folder.*dump_rollouts"):
            ReplayEngine(folder, process_groups, None)

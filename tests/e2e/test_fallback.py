"""A run whose newest checkpoint is damaged, through the complete program; and what `asd-megatron checkpoint` says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from asd_megatron import train
from asd_megatron.checkpoint import lineage
from asd_megatron.cli.main import main
from asd_megatron.run.history import read_history
from tests.e2e.world import World, call, metrics, refusal, steps

OPTIONS: dict[str, dict[str, Any]] = {"run": {"steps": 6}, "checkpoint": {"every": 1, "keep": 2, "keep_every": 2}}


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    capsys.readouterr()
    status = main(["checkpoint", *arguments])
    return status, capsys.readouterr().out


def test_a_damaged_checkpoint_gives_way_to_the_one_before(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    straight = world.train("straight_damage", **OPTIONS)
    found = sorted(path.name for path in (straight / "checkpoints").glob("step_*"))
    assert found == ["step_000002", "step_000004", "step_000005", "step_000006"]  # the newest two, and every second
    run = world.train("damaged", "--run.steps", "5", "--optimizer.schedule", "constant", **OPTIONS)
    saved = run / "checkpoints"
    assert _said(capsys, "verify", str(run))[0] == _said(capsys, "list", str(run))[0] == 0

    _flip(saved / "step_000005" / "__0_0.distcp")
    (saved / "step_000004" / "common.pt").unlink()
    status, text = _said(capsys, "verify", str(run))
    assert status == 1 and f"{saved / 'step_000002'}: intact" in text
    assert "DAMAGED\n  common.pt is missing" in text and "DAMAGED\n  the content of __0_0.distcp has changed" in text
    status, text = _said(capsys, "list", str(run), "--json")
    listed = {line["name"]: line for line in json.loads(text)["checkpoints"]}
    assert status == 0 and listed["step_000005"]["latest"] and listed["step_000005"]["problem"] is None
    assert listed["step_000004"]["problem"] == "common.pt is missing"
    assert listed["step_000002"]["layout"] == "1 rank" and listed["step_000002"]["stage"] == "train"

    arguments = [str(world.recipe(**OPTIONS)), "--run.name", "damaged"]
    named = refusal(capsys, train.main, [*arguments, "--checkpoint.resume", str(saved / "step_000005")])
    assert "the content of __0_0.distcp has changed" in named and "no other one is taken" in named
    assert call(train.main, arguments) == 0
    said = capsys.readouterr().err
    assert "step_000005 is damaged: the content of __0_0.distcp has changed" in said
    assert "step_000004 is damaged: common.pt is missing" in said and "resumes from the one before, step_000002" in said
    events = [event for event in read_history(run) if event["event"] in ("fallback", "resume")]
    assert [Path(event.get("damaged", event.get("checkpoint"))).name for event in events] == [
        "step_000005", "step_000004", "step_000002",
    ]  # fmt: skip
    assert steps(run) == [1, 2, 3, 4, 5, 6] and metrics(run) == metrics(straight)
    assert lineage.latest(saved) == saved / "step_000006" and _said(capsys, "verify", str(run))[0] == 0

    for path in saved.glob("step_*/run_state.json"):
        path.unlink()
    for path in (saved / "step_000006").iterdir():
        path.unlink()
    status, text = _said(capsys, "list", str(run))
    assert status == 1 and "step_000006" in text and "intact" not in text
    lost = refusal(capsys, train.main, [*arguments, "--run.steps", "7"])
    assert "step_000002 is damaged: run_state.json is missing" in lost and "There is no older one" in lost
    (saved / "step_000006").rmdir()
    status, text = _said(capsys, "verify", str(run))
    assert status == 1 and "step_000006 is damaged: its folder is missing" in text

"""Training checkpoints: a run that was saved and loaded continues bit for bit like the one that was not stopped."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from asd_megatron.checkpoint import lineage
from asd_megatron.checkpoint.manifest import MANIFEST, Manifest
from asd_megatron.checkpoint.run_state import RunStateFile
from asd_megatron.errors import UserError
from tests.checkpoint.trainer import RUN_STATE, Trainer
from tests.distributed.harness import run_ranks

# Everything below that names a `rank` runs on two ranks.

LAYOUTS: dict[str, tuple[dict[str, Any], bool, torch.dtype]] = {
    "dp2_distopt": ({"data": 2}, True, torch.float32),
    "dp2_distopt_bf16": ({"data": 2}, True, torch.bfloat16),
    "dp2": ({"data": 2}, False, torch.float32),
    "tp2": ({"tensor": 2}, False, torch.float32),
    "tp2_distopt": ({"tensor": 2}, True, torch.float32),
    # A tied embedding has a bucket of its own on the first and the last stage: padding between buckets.
    "pp2_vpp2_distopt": ({"pipeline": 2, "virtual_pipeline": 2}, True, torch.float32),
}
USED = ("dp2_distopt", "tp2")


def _continue(rank: int, folder: str) -> dict[str, Any]:
    report = {}
    for case, (layout, distributed, dtype) in LAYOUTS.items():
        path = Path(folder) / case
        straight = Trainer(layout, distributed, seed=1, dtype=dtype, copies=True)
        start = straight.weights()
        straight.steps(range(2))
        straight.save(path, 2)
        saved_rate = straight.learning_rate
        straight.steps(range(2, 5))
        for used in (False, True)[: 1 + (case in USED)]:  # into a fresh trainer, and into one that has made steps
            again = Trainer(layout, distributed, seed=2, dtype=dtype, copies=True)
            if used:
                again.steps(range(7, 9))
            before = again.weights()
            state = again.load(lineage.latest(path))
            again.kept()  # exchanges the weights and puts them back
            same_rate = again.learning_rate == saved_rate
            again.steps(range(2, 5))
            got, want = again.weights(), straight.weights()
            kept, same = again.kept(), straight.kept()
            report[f"{case} used={used}"] = {
                "state": state,
                "same_rate": same_rate,
                "equal": all(torch.equal(got[n], want[n]) for n in want),
                "copies": straight.copies is not None
                and again.copies is not None
                and all(
                    torch.equal(a, b)
                    for name in straight.copies.names
                    for a, b in zip(straight.copies._copies[name], again.copies._copies[name], strict=True)
                ),
                "initial": all(torch.equal(kept[f"initial {n}"], start[n]) for n in start),
                "average": any(not torch.equal(same[f"ema {n}"], want[n]) for n in want),
                "differed": any(not torch.equal(before[n], want[n]) for n in want),
            }
    return report


def test_continues_bit_for_bit(tmp_path: Path) -> None:
    for report in run_ranks(_continue, 2, str(tmp_path)):
        assert len(report) == len(LAYOUTS) + len(USED)
        for case, found in report.items():
            assert found["equal"] and found["differed"] and found["same_rate"], case
            assert found["copies"] and found["initial"] and found["average"], case
            assert found["state"] == RUN_STATE, case


def _write(rank: int, folder: str) -> None:
    for name, (layout, distributed) in WRITTEN.items():
        trainer = Trainer(layout, distributed, seed=1, copies=True, **ROWS)
        trainer.steps(range(2))
        trainer.save(Path(folder) / name, 2)


def _other_layout(rank: int, folder: str) -> dict[str, float]:
    report = {}
    for name, (_, distributed) in WRITTEN.items():
        want: dict[str, torch.Tensor] = {}
        for layout in READ:
            again = Trainer(layout, distributed, seed=2, copies=True, **ROWS)
            again.load(lineage.latest(Path(folder) / name))
            again.steps(range(2, 4))
            got = again.weights() | again.kept()
            if not want:  # without a checkpoint
                straight = Trainer(layout, distributed, seed=1, copies=True, **ROWS)
                straight.steps(range(4))
                want = straight.weights() | straight.kept()
            report[f"{name} {layout}"] = max((got[n] - want[n]).abs().max().item() for n in want)
    return report


WRITTEN: dict[str, tuple[dict[str, Any], bool]] = {
    "dp2_distopt": ({"data": 2}, True),
    "tp2": ({"tensor": 2}, False),
}
ROWS = {"hidden_size": 20}  # the ranges of the distributed optimizer, multiples of 64, cut rows of 20 numbers
READ: list[dict[str, Any]] = [
    {"data": 4},
    {"tensor": 2, "data": 2},
    {"pipeline": 2, "virtual_pipeline": 2, "data": 2},
    {"tensor": 2, "pipeline": 2},
]


def _without_copies(rank: int, folder: str) -> dict[str, bool]:
    """A checkpoint with copies read by a run without any, and one without read by a run that has some."""
    root = Path(folder)
    keeping, plain = Trainer({}, False, seed=1, copies=True), Trainer({}, False, seed=2)
    keeping.steps(range(2))
    plain.steps(range(1))
    path, other = keeping.save(root / "keeping", 2), plain.save(root / "plain", 1)
    stored = [RunStateFile.read(folder).copies for folder in (path, other)]
    found = {"stored": stored == [("initial", "ema"), ()]}
    plain.load(path)
    found["read"] = all(
        torch.equal(a, b) for a, b in zip(plain.weights().values(), keeping.weights().values(), strict=True)
    )
    kept = keeping.kept()
    keeping.load(other)
    found["stay"] = all(torch.equal(tensor, kept[name]) for name, tensor in keeping.kept().items())
    return found


def test_checkpoints_with_and_without_copies(tmp_path: Path) -> None:
    assert run_ranks(_without_copies, 1, str(tmp_path)) == [{"stored": True, "read": True, "stay": True}]


def test_another_layout_can_resume(tmp_path: Path) -> None:
    run_ranks(_write, 2, str(tmp_path))
    for case, error in run_ranks(_other_layout, 4, str(tmp_path))[0].items():
        assert error < 1e-6, case


def _refusals(rank: int, folder: str) -> dict[str, str]:
    def refusal(action: Any, kind: type[Exception] = UserError) -> str:
        with pytest.raises(kind) as caught:
            action()
        return str(caught.value)

    found: dict[str, str] = {}
    trainer = Trainer({}, False, seed=1)
    trainer.steps(range(1))
    root = Path(folder)
    path = trainer.save(root, 1)
    found["distributed"] = refusal(lambda: Trainer({}, True, seed=1).load(path))
    found["layers"] = refusal(lambda: Trainer({}, False, seed=1, num_hidden_layers=2).load(path))
    found["width"] = refusal(lambda: Trainer({}, False, seed=1, intermediate_size=48).load(path))
    found["not a checkpoint"] = refusal(lambda: trainer.load(root))
    found["tuple"] = refusal(lambda: trainer.save(root, 2, {"a": {1: 2}}), ValueError)
    found["tensor"] = refusal(lambda: trainer.save(root, 2, {"a": [torch.ones(1)]}), ValueError)

    mark = root / "executed"
    metadata = (path / ".metadata").read_bytes()
    (path / ".metadata").write_bytes(pickle.dumps(_Touch(str(mark))))
    found["changed"] = refusal(lambda: trainer.load(path))
    (path / MANIFEST).unlink()
    Manifest.write(path, 1, "", {}, {})  # somebody's who has thought of that too
    found["malicious"] = refusal(lambda: trainer.load(path))
    found["executed"] = str(mark.exists())
    (path / ".metadata").write_bytes(metadata)
    (path / MANIFEST).unlink()
    Manifest.write(path, 1, "", {}, {})
    shard = next(path.glob("*.distcp"))
    shard.unlink()
    found["missing shard"] = refusal(lambda: trainer.load(path))
    (path / MANIFEST).unlink()  # which would name the changed file first
    stored = json.loads((path / lineage.RUN_STATE).read_text())
    broken = [{}, [], {**stored, "run_state": 1}, {**stored, "distributed_optimizer": None}, {**stored, "format": 2}]
    for content in ("{", "[" * 100_000, '{"a": 1' + "0" * 5000 + "}", *map(json.dumps, broken)):
        (path / lineage.RUN_STATE).write_text(content)
        assert str(path / lineage.RUN_STATE) in refusal(lambda: trainer.load(path)), content[:40]
    return found


class _Touch:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def test_what_is_refused(tmp_path: Path) -> None:
    found = run_ranks(_refusals, 1, str(tmp_path))[0]
    assert "set parallelism.distributed_optimizer" in found["distributed"]
    assert "does not fit this model" in found["layers"]
    assert "does not fit this model" in found["width"]
    assert "is no training checkpoint" in found["not a checkpoint"]
    assert "run_state.a has the key 1" in found["tuple"]
    assert "run_state.a[0] is a Tensor" in found["tensor"]
    assert "is damaged: .metadata has" in found["changed"]
    assert "not safe to read" in found["malicious"]
    assert found["executed"] == "False"
    assert "__0_0.distcp is missing" in found["missing shard"]


def _kept(rank: int, folder: str) -> tuple[list[list[str]], dict[str, list[str]]]:
    """What is left after each save, and after 20, 40, 60, a resume from one of them, and saves."""
    trainer = Trainer({}, False, seed=1)
    after_each, lineages = [], {}
    for step in (5, 10, 15, 15):
        trainer.save(Path(folder) / "plain", step, {"step": step}, keep=2)
        after_each.append(sorted(os.listdir(Path(folder) / "plain")))
    stored = json.loads((Path(folder) / "plain" / "step_000015" / "run_state.json").read_text())
    assert stored["run_state"] == {"step": 15}
    for case, (resumed, saves, keep) in LINEAGES.items():
        root = Path(folder) / case
        for step in (20, 40, 60):
            trainer.save(root, step, keep=3)
        lineage.name_latest(root, lineage.name(resumed))
        for step in saves:
            trainer.save(root, step, keep=keep)
            assert lineage.latest(root) == root / lineage.name(step)
        lineages[case] = sorted(os.listdir(root))
    return after_each, lineages


LINEAGES: dict[str, tuple[int, tuple[int, ...], int]] = {
    "from the newest": (60, (80,), 2),
    "between": (20, (30,), 2),
    "over an abandoned one": (20, (40,), 3),
    "past them all": (20, (70,), 3),
    "one kept": (40, (50,), 1),
    "twice": (20, (30, 45), 3),
}


def test_the_newest_of_the_lineage_are_kept(tmp_path: Path) -> None:
    seen, lineages = run_ranks(_kept, 1, str(tmp_path))[0]
    assert seen[0] == ["latest", "step_000005"]
    assert seen[1] == ["latest", "step_000005", "step_000010"]
    assert seen[2] == seen[3] == ["latest", "step_000010", "step_000015"]
    steps = {case: [int(name[5:]) for name in names if name != "latest"] for case, names in lineages.items()}
    assert steps == {
        "from the newest": [60, 80],
        "between": [20, 30],
        "over an abandoned one": [20, 40],
        "past them all": [20, 70],
        "one kept": [50],
        "twice": [20, 30, 45],
    }


def test_a_resume_names_what_its_next_save_replaces(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (20, 40):
        (tmp_path / lineage.name(step)).mkdir()
    lineage.name_latest(tmp_path, "step_000040")
    assert not caplog.messages
    lineage.name_latest(tmp_path, "step_000020")
    assert "step_000040" in caplog.text and "move them" in caplog.text


def test_latest(tmp_path: Path) -> None:
    assert lineage.latest(tmp_path) is None
    assert lineage.latest(tmp_path / "absent") is None
    for named in ("step_000003", "../elsewhere", ""):
        (tmp_path / "latest").write_text(named + "\n")
        with pytest.raises(UserError, match="no checkpoint in"):
            lineage.latest(tmp_path)
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").mkdir()
    with pytest.raises(UserError, match="latest cannot be read"):
        lineage.latest(tmp_path)
    (tmp_path / "latest").rmdir()
    (tmp_path / "step_000003").mkdir()
    (tmp_path / "step_000003" / "run_state.json").write_text("{}")
    (tmp_path / "latest").write_text("step_000003\n")
    assert lineage.latest(tmp_path) == tmp_path / "step_000003"

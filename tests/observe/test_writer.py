"""metrics.jsonl and TensorBoard: one object a step, strict JSON, resume without later lines."""

from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path

import pytest

from asd_megatron.errors import UserError
from asd_megatron.observe import lines
from asd_megatron.observe.lines import LineFile
from asd_megatron.observe.writer import RunWriter, read_metrics

NAN = float("nan")


def steps(folder: Path) -> list[int]:
    return [row["step"] for row in read_metrics(folder)]


def test_lines_are_flushed_and_strict(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path, tensorboard=False)
    writer.write(0, {"evaluation/accuracy": 0.25})
    writer.write(1, {"reward/mean": 0.5, "pmi/mean": NAN, "loss/policy": float("inf")})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()  # before close
    writer.close()

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    row = json.loads(lines[1], parse_constant=refuse)
    assert row.pop("time_utc").endswith("+00:00")
    assert row == {"step": 1, "reward/mean": 0.5, "pmi/mean": None, "loss/policy": None}


def test_one_object_a_step_in_order(tmp_path: Path) -> None:
    with RunWriter(tmp_path, tensorboard=False) as writer:
        writer.write(3, {})
        with pytest.raises(ValueError, match="step 3 after step 3"):
            writer.write(3, {})


def test_resume_drops_later_lines_and_a_torn_one(tmp_path: Path) -> None:
    with RunWriter(tmp_path, tensorboard=False) as writer:
        for step in range(6):
            writer.write(step, {"reward/mean": float(step)})
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 6, "rewa')  # killed while writing
    assert steps(tmp_path) == [0, 1, 2, 3, 4, 5]
    with RunWriter(tmp_path, tensorboard=False, resume_step=3) as writer:
        assert steps(tmp_path) == [0, 1, 2, 3]
        writer.write(4, {"reward/mean": 40.0})
    assert [row["reward/mean"] for row in read_metrics(tmp_path)] == [0, 1, 2, 3, 40]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_a_fresh_start_forgets_the_old_run(tmp_path: Path) -> None:
    for _ in range(2):
        with RunWriter(tmp_path) as writer:
            writer.write(1, {"reward/mean": 1.0})
    assert steps(tmp_path) == [1]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


def test_tensorboard_has_the_same_names_and_survives_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with RunWriter(tmp_path) as writer:
        writer.text("recipe", "run:\n  name: x")
        for step in (1, 2, 3):
            writer.write(step, {"reward/mean": step / 10, "pmi/mean": NAN})
    now = time.time  # TensorBoard reads files in the order of their names, which begin with the second
    monkeypatch.setattr(time, "time", lambda: now() + 2)
    with RunWriter(tmp_path, resume_step=2) as writer:
        writer.write(3, {"reward/mean": 0.9, "pmi/mean": 0.1})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    points = [(p.step, round(p.value, 5)) for p in events.Scalars("reward/mean")]
    assert points == [(1, 0.1), (2, 0.2), (3, 0.9)]
    assert [p.step for p in events.Scalars("pmi/mean")] == [3]
    assert events.Tags()["tensors"] == ["recipe/text_summary"]


def test_resume_in_an_empty_folder_starts(tmp_path: Path) -> None:
    with RunWriter(tmp_path / "new", tensorboard=False, resume_step=7) as writer:
        writer.write(8, {})
    assert steps(tmp_path / "new") == [8]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist: give the folder of a run"),
        ('{"step": 1}\nnonsense\n{"step": 2}\n', r"metrics\.jsonl:2: not a JSON object"),
        ('{"step": 1}\n[1]\n', r"metrics\.jsonl:2: no whole number `step`"),
    ],
)
def test_unreadable_metrics(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        read_metrics(tmp_path)


def test_lines_wait_for_room_and_none_is_torn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = LineFile(tmp_path / "lines.jsonl")
    assert file.write({"step": 1}) is None
    write, room = os.write, 5

    def full(handle: int, data: bytes) -> int:
        nonlocal room
        if not room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = write(handle, data[:room])
        room -= written
        return written

    monkeypatch.setattr(lines.os, "write", full)
    assert "No space left on device" in str(file.write({"step": 2}))
    assert file.write({"step": 3}) is None and file.waiting == 2
    assert (tmp_path / "lines.jsonl").read_text() == '{"step": 1}\n'
    with pytest.raises(OSError, match="No space"):
        file.write_waiting()
    room = 7  # a write may take less than it is given
    monkeypatch.setattr(lines.os, "write", lambda handle, data: write(handle, data[:7]))
    assert "2 lines that had waited" in str(file.write({"step": 4}))
    assert [row["step"] for row in lines.read_lines(tmp_path / "lines.jsonl")] == [1, 2, 3, 4]
    (tmp_path / "lines.jsonl").unlink()
    with pytest.raises(FileNotFoundError):
        file.write({"step": 5})
    monkeypatch.undo()

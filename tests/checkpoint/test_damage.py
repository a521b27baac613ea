"""A checkpoint whose files are not as they were written is not loaded, on any rank, and the file is named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from asd_megatron.checkpoint import training
from asd_megatron.checkpoint.manifest import MANIFEST, DamagedCheckpoint, Manifest, _own_checksum
from asd_megatron.distributed.objects import meet
from asd_megatron.errors import UserError
from asd_megatron.models.compat import optimizer_parts
from tests.checkpoint.trainer import RUN_STATE, Trainer
from tests.distributed.harness import run_ranks

PAGE = 4096
FILES = ("__0_0.distcp", "__1_0.distcp", ".metadata", "common.pt", "metadata.json", "run_state.json", MANIFEST)


def _flip(path: Path, at: float) -> None:
    """One bit, at that fraction of the file."""
    data = bytearray(path.read_bytes())
    data[min(int(at * len(data)), len(data) - 1)] ^= 4
    path.write_bytes(data)


def _lose_page(path: Path) -> None:
    data = path.read_bytes()
    start = len(data) // 2
    path.write_bytes(data[:start] + bytes(min(PAGE, len(data) - start)) + data[start + PAGE :])


DAMAGE: dict[str, Callable[[Path], None]] = {
    **{f"a bit at {at}": (lambda path, at=at: _flip(path, at)) for at in (0.4, 1.0)},  # type: ignore[misc]
    "a page": _lose_page,
    "truncated": lambda path: os.truncate(path, path.stat().st_size * 2 // 3),
    "a digit": lambda path: path.write_bytes(path.read_bytes().replace(b"1", b"3", 1)),  # of a format, in JSON
    "missing": lambda path: path.unlink(),
}


def _damaged(rank: int, folder: str) -> dict[str, str]:
    """The refusal of each kind of damage to each file."""
    root = Path(folder)
    trainer = Trainer({"data": 2}, True, seed=1, copies=True)
    trainer.steps(range(1))
    saved = trainer.save(root / "good", 2)
    host, found = trainer.port.process_groups.host, {}
    reader = Trainer({"data": 2}, True, seed=2, copies=True)
    before = reader.weights()
    for name in FILES:
        for kind, damage in DAMAGE.items():
            copy = root / f"{name} {kind}"
            if rank == 0:
                shutil.copytree(saved, copy)
                damage(copy / name)
            meet(host)
            with pytest.raises(UserError) as caught:
                reader.load(copy)
            assert isinstance(caught.value, DamagedCheckpoint), (name, kind)
            assert name in str(caught.value) and str(copy) in str(caught.value), (name, kind, str(caught.value))
            found[f"{name} {kind}"] = str(caught.value)
    untouched = all(torch.equal(tensor, before[n]) for n, tensor in reader.weights().items())
    reader.load(saved)
    after = reader.weights()
    assert untouched and all(torch.equal(tensor, after[n]) for n, tensor in trainer.weights().items())
    return found


def test_damage_is_found_and_named(tmp_path: Path) -> None:
    one, other = run_ranks(_damaged, 2, str(tmp_path))
    assert one == other and len(one) == len(FILES) * len(DAMAGE)
    assert "__1_0.distcp is missing" in one["__1_0.distcp missing"]
    assert "the content of common.pt has changed (checksum " in one["common.pt a bit at 0.4"]
    assert " bytes, and " in one[".metadata truncated"]


def _numbers(rank: int, folder: str) -> list[str]:
    """What is said about numbers that are not finite, in weights, optimizer state and copies; and of a checkpoint of a
    version without manifests."""
    found = []
    for number, what in enumerate(("weight", "moment", "copy")):
        trainer = Trainer({}, False, seed=1, copies=True)
        trainer.steps(range(1))
        weight = next(trainer.port.chunks[0].parameters())
        if what == "weight":
            weight.data.view(-1)[-1] = float("nan")
        elif what == "moment":
            (adam,) = optimizer_parts(trainer.optimizer)
            next(iter(adam.optimizer.state.values()))["exp_avg_sq"].view(-1)[0] = float("inf")
        else:
            assert trainer.copies is not None
            trainer.copies._copies["ema"][0].view(-1)[0] = float("-inf")
        noticed = training.not_finite(trainer.port, trainer.optimizer, trainer.copies)
        path = trainer.save(Path(folder) / str(number), 2)  # a run does not
        with pytest.raises(DamagedCheckpoint, match="numbers that are not finite") as caught:
            Trainer({}, False, seed=2, copies=True).load(path)
        assert noticed is not None and f": {noticed} holds" in str(caught.value)
        found.append(str(caught.value))
    trainer = Trainer({}, False, seed=1)
    old = trainer.save(Path(folder) / "old", 2)
    (old / MANIFEST).unlink()
    with pytest.raises(DamagedCheckpoint, match="manifest.json is missing"):
        trainer.load(old)
    state = (old / "run_state.json").read_text()
    (old / "run_state.json").write_text(state.replace('"manifest": true', '"manifest": false'))
    assert trainer.load(old) == RUN_STATE
    return found


def test_numbers_that_are_not_finite(tmp_path: Path) -> None:
    ((weight, moment, copy),) = run_ranks(_numbers, 1, str(tmp_path))
    assert "optimizer.state" not in weight and "optimizer.state.exp_avg_sq." in moment and "ema" in copy


def test_each_rank_checks_its_own_file_and_a_share_of_the_others(tmp_path: Path) -> None:
    for name, size in {"__0_0.distcp": 50, "__1_0.distcp": 40, "__2_0.distcp": 30, "common.pt": 1}.items():
        (tmp_path / name).write_bytes(bytes(size))
    manifest = Manifest.write(tmp_path, 1, "train", {"data": 3}, {})
    assert Manifest.read(tmp_path) == manifest
    three, two = manifest.shares(3), manifest.shares(2)
    assert [names[0] for names in three] == ["__0_0.distcp", "__1_0.distcp", "__2_0.distcp"]
    assert two == [["__0_0.distcp", "common.pt"], ["__1_0.distcp", "__2_0.distcp"]]
    assert sorted(sum(manifest.shares(9), [])) == sorted(manifest.files)


@pytest.mark.parametrize("changed", [{"time_utc": "yesterday"}, {"files": {"a\0b": {"bytes": 1, "checksum": "0"}}}])
def test_a_manifest_that_somebody_has_made(tmp_path: Path, changed: dict[str, Any]) -> None:
    """With the right checksum of its own."""
    Manifest.write(tmp_path, 1, "train", {}, {})
    content = json.loads((tmp_path / MANIFEST).read_text()) | changed
    del content["own_checksum"]
    (tmp_path / MANIFEST).write_text(json.dumps({**content, "own_checksum": _own_checksum(content)}))
    with pytest.raises(DamagedCheckpoint):
        Manifest.read(tmp_path)

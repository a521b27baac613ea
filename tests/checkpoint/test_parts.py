"""What a rank stores of a checkpoint's tensors, beside Megatron's gathered state and dense indexing."""

from __future__ import annotations

import math
import random
from functools import partial
from pathlib import Path
from typing import Any

import torch

from asd_megatron.checkpoint.distcp import DistributedCheckpoint
from asd_megatron.checkpoint.parts import Box, Part, own, rectangles
from tests.checkpoint import megatron_writer
from tests.checkpoint.trainer import MOE, Trainer
from tests.distributed.harness import run_ranks


def test_ranges_as_rectangles() -> None:
    rng = random.Random(3)
    for shape in ((), (7,), (4, 5), (3, 1, 4), (2, 3, 4, 5), (1, 1, 6)):
        tensor = torch.arange(math.prod(shape)).reshape(shape)
        for _ in range(60):
            begin, end = sorted(rng.choices(range(tensor.numel() + 1), k=2))
            found = list(rectangles(shape, begin, end))
            assert len(found) <= max(1, 2 * len(shape) - 1)
            numbers = []
            for offsets, sizes in found:
                box = tensor[tuple(slice(a, a + n) for a, n in zip(offsets, sizes, strict=True))]
                assert tuple(box.shape) == sizes
                numbers += box.flatten().tolist()
            assert numbers == list(range(begin, end)), (shape, begin, end)


def test_equal_parts_are_spread_over_their_ranks() -> None:
    def parts(replica: int, writer: bool = True) -> list[Part]:
        found = []
        for number, (size, replicas) in enumerate([(5, 4), (300, 4), (90, 4), (80, 2), (70, 4), (60, 4), (50, 2)]):
            box = Box(str(number), (size,), (0,), (size,), 0, False)
            values = partial(torch.zeros, size)
            found.append(Part((box,), torch.float32, values, writer, replica % replicas, replicas))
        return [*found, Part((Box("own", (9,), (0,), (9,), 0, False),), torch.float32, partial(torch.zeros, 9), writer)]

    shares = [[part.boxes[0].key for part in own(parts(replica))] for replica in range(4)]
    assert shares == [["own", "1", "3"], ["own", "2", "6"], ["own", "3", "4"], ["own", "5", "6", "0"]]
    assert own(parts(0, writer=False)) == []


CASES: list[tuple[dict[str, Any], torch.dtype, dict[str, Any]]] = [
    ({"data": 3}, torch.bfloat16, {"hidden_size": 20}),
    ({"data": 3, "expert": 3}, torch.float32, {**MOE, "hidden_size": 20}),
]
"""Rows of 20 numbers, which the ranges of the distributed optimizer, multiples of 64, cut."""


def _both(rank: int, folder: str) -> dict[str, bool]:
    found = {}
    for number, (layout, dtype, model) in enumerate(CASES):
        trainer = Trainer(layout, True, 1, dtype, **model)
        trainer.steps(range(2))
        ours = DistributedCheckpoint(trainer.save(Path(folder) / f"{number}", 2))
        gathered = megatron_writer.save_training(Path(folder) / f"gathered_{number}", trainer)
        theirs = DistributedCheckpoint(gathered)
        found[f"{number} keys"] = ours.tensors.keys() == theirs.tensors.keys()
        cut = [tensor.shape[-1] > chunk.sizes[-1] for tensor in ours.tensors.values() for chunk in tensor.chunks]
        found[f"{number} rows are cut"] = any(cut)
        found[f"{number} numbers"] = all(torch.equal(ours.read(key), theirs.read(key)) for key in ours.tensors)
        before = trainer.weights()
        trainer.steps(range(2, 4))
        want = trainer.weights()
        again = Trainer(layout, True, 2, dtype, **model)
        again.load(gathered)
        again.steps(range(2, 4))
        after = again.weights()
        found[f"{number} loads"] = all(torch.equal(tensor, after[n]) for n, tensor in want.items())
        found[f"{number} moves"] = not all(torch.equal(tensor, after[n]) for n, tensor in before.items())
    return found


def test_the_stored_tensors_are_those_that_megatron_gathers(tmp_path: Path) -> None:
    """Also that checkpoints of earlier versions, which stored these, are loaded."""
    for found in run_ranks(_both, 3, str(tmp_path)):
        assert all(found.values()), found

"""Checkpoints of Transformer Engine's layers for local ones and the reverse, in bfloat16, on a GPU. On the CPU
`test_foreign.py` runs `interchange` with the stand-in."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch

from tests.checkpoint.trainer import Trainer
from tests.distributed.harness import run_ranks

LAYERS: tuple[Literal["local", "te"], ...] = ("local", "te")
ULP = 2.0**-7  # of bfloat16, relative


def interchange(rank: int, folder: str) -> list[str]:
    """Each kind of layers continues from the other's checkpoint as the other does. Returns the optimizers' names."""
    saved, at_save, at_end, optimizers = {}, {}, {}, []
    for layers in LAYERS:
        first = Trainer({}, False, 1, torch.bfloat16, layers=layers)
        first.steps(range(2))
        saved[layers] = first.save(Path(folder) / layers, 2)
        at_save[layers] = first.weights()
        first.steps(range(2, 4))
        at_end[layers] = first.weights()
        optimizers.append(type(first.optimizer.optimizer).__name__)
    for source, target in (LAYERS, LAYERS[::-1]):
        again = Trainer({}, False, 2, torch.bfloat16, layers=target)
        again.load(saved[source])
        assert all(torch.equal(tensor, at_save[source][name]) for name, tensor in again.weights().items())
        again.steps(range(2, 4))
        for name, tensor in again.weights().items():
            assert not torch.equal(tensor, at_save[source][name])
            torch.testing.assert_close(tensor, at_end[source][name], rtol=ULP, atol=1e-5, msg=f"{source}: {name}")
    return optimizers


@pytest.mark.gpu
def test_on_cuda(tmp_path: Path) -> None:
    run_ranks(interchange, 1, str(tmp_path), init=False, fresh=True)

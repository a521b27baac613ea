"""Weights that are kept in FP8: what the master weights begin with, what exports and checkpoints hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from asd_megatron.models.precision import BFLOAT16, Precision, Scaling
from tests.checkpoint.trainer import CONFIG, Trainer, weights
from tests.te_double import run_ranks_with_te


def _trainer(ranks: int, precision: Precision, seed: int) -> Trainer:
    return Trainer({"data": ranks}, True, seed, torch.bfloat16, layers="te", precision=precision)


def _in_fp8(trainer: Trainer) -> set[str]:
    """Names of the parameters in FP8."""
    chunk = trainer.port.chunks[0].module
    return {name for name, p in chunk.named_parameters() if type(p).__module__.startswith("transformer_engine")}


def _masters(trainer: Trainer) -> dict[str, Tensor]:
    """This rank's shards of the float32 master weights, flat, by parameter."""
    chunk = trainer.port.chunks[0].module
    found: dict[str, Any] = {name: getattr(p, "main_param", None) for name, p in chunk.named_parameters()}
    return {name: master.clone() for name, master in found.items() if master is not None}


def _equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in found)


def _check(rank: int, folder: str, ranks: int, fp8: Scaling) -> None:
    precision = Precision(fp8, parameters=True)
    theirs = _masters(_trainer(ranks, BFLOAT16, 1))
    trainer = _trainer(ranks, precision, 1)
    ours = _masters(trainer)
    middle = [f"decoder.layers.{layer}.{linear}.weight" for layer in (1, 2) for linear in LINEAR]
    assert _in_fp8(trainer) == set(middle)
    whole = {name for name in ours if name in theirs and ours[name].numel() == theirs[name].numel()}
    assert whole & set(middle) and all(torch.equal(ours[name], theirs[name]) for name in whole)

    loaded = {name: value.bfloat16() for name, value in weights(trainer.port.expected(), 1).items()}
    exported = trainer.weights()
    for name, value in exported.items():
        quantized = ".layers.1." in name or ".layers.2." in name
        assert value.dtype is torch.bfloat16
        assert torch.equal(value, loaded[name]) == ("proj" not in name or not quantized), name
        assert (value - loaded[name]).abs().max() <= 2**-4 * loaded[name].abs().max(), name

    trainer.steps(range(2))
    assert not _equal(trainer.weights(), exported)
    saved = trainer.save(Path(folder) / "fp8", 2)
    before = trainer.weights()
    trainer.steps(range(2, 4))
    after = trainer.weights()

    again = _trainer(ranks, precision, 2)
    again.load(saved)
    assert _equal(again.weights(), before)
    again.steps(range(2, 4))
    assert _equal(again.weights(), after)

    other = _trainer(ranks, BFLOAT16, 2)  # a run that resumes in bfloat16: its weights are the rounded master weights
    other.load(saved)
    finer = other.weights()
    assert not _equal(finer, before)
    back = other.save(Path(folder) / "bf16", 2)
    last = _trainer(ranks, precision, 3)
    last.load(back)
    assert _equal(last.weights(), before)


LINEAR = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


@pytest.mark.parametrize(("ranks", "fp8"), [(1, "blockwise"), (2, "current")])
def test_fp8_parameters(tmp_path: Path, ranks: int, fp8: Scaling) -> None:
    assert CONFIG["num_hidden_layers"] == 4  # of which the first and the last stay bfloat16
    run_ranks_with_te(_check, ranks, str(tmp_path), ranks, fp8)

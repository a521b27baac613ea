"""The checks of Transformer Engine's updates, on the stand-in: they pass, and each fault of FP8 fails them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from asd_megatron.checks import te_update
from tests.te_double import run_ranks_with_te


def _measure(rank: int, folder: str) -> dict[str, Any]:
    for recipe in ("none", "blockwise"):
        assert te_update.main([recipe, "--json", f"{folder}/{recipe}.json"]) == 0
    with _faults():
        return {"problems": te_update.measure("current").problems}


@contextlib.contextmanager
def _faults() -> Iterator[None]:
    """Layers keep the FP8 copy of their first weights, and scores are made in FP8."""
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule as Module

    from asd_megatron.models.port import ModelPort

    product = Module.product
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Module, "product", lambda self, x, name, _: product(self, x, name, False))
        patch.setattr(ModelPort, "_scored_precision", lambda *_: contextlib.nullcontext())
        yield


def test_a_right_model_passes_and_faults_are_found(tmp_path: Path) -> None:
    problems = run_ranks_with_te(_measure, 1, str(tmp_path))[0]["problems"]
    for words in ("scores in bfloat16", "after an update"):
        assert any(words in problem for problem in problems), problems
    bfloat16, fp8 = (json.loads((tmp_path / f"{name}.json").read_text())["figures"] for name in ("none", "blockwise"))
    assert bfloat16["rounded when fused"] < 1e-3 and bfloat16["rounded when not"] == 1
    assert 1e-4 < bfloat16["effect"] < 1e-2 and "cuDNN" in bfloat16["attention"]
    assert (
        0 < fp8["loss error"] < te_update.LOSS_BOUND / 2 and 0.02 < fp8["gradient error"] < te_update.GRADIENT_BOUND / 2
    )
    assert fp8["stale weights error"] == fp8["sampling error"] == 0 < fp8["extra states"]

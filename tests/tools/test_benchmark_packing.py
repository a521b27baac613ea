"""tools/benchmark_packing.py: the schedule's times by hand, and the targets on one case."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import benchmark_packing


def test_equal_packs_take_the_packs_and_the_stages_less_one() -> None:
    assert benchmark_packing.pipeline_time([1.0] * 6, 3, 2.0) == (6 + 2) * 3
    assert benchmark_packing.pipeline_time([1.0, 4.0, 2.0], 3, 0.0) == 7 + 2 * 4
    assert benchmark_packing.pipeline_time([1.0, 4.0, 2.0], 1, 2.0) == 21


@pytest.mark.parametrize("model", benchmark_packing.MODELS)
def test_the_targets_are_met(model: str) -> None:
    row = benchmark_packing.measure(model, "long tail", 16, 4, 2, 65536)
    before, after = row.by_tokens, row.by_flops
    assert after.imbalance < 1.002 < before.imbalance and after.bubble < before.bubble
    assert after.padding < 0.02 and after.packs == 4

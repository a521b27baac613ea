"""tools/measure_step_time.py: the correlation by hand, and one layout of two ranks measured beside its prediction."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import measure_step_time


def test_rank_correlation_by_hand() -> None:
    assert measure_step_time.spearman([1.0, 2.0, 3.0], [5.0, 6.0, 9.0]) == 1.0
    assert measure_step_time.spearman([1.0, 2.0, 3.0], [9.0, 6.0, 5.0]) == -1.0
    # Ranks 0 1 2 3 and 1 0 2 3: 1 - 6 x 2 / (4 x 15).
    assert measure_step_time.spearman([1.0, 2.0, 3.0, 4.0], [2.0, 1.0, 3.0, 4.0]) == pytest.approx(0.8)
    assert math.isnan(measure_step_time.spearman([1.0, 1.0], [1.0, 2.0]))


@pytest.mark.slow
def test_a_layout_of_two_ranks_is_measured_and_predicted() -> None:
    name = "TP 2, sequence parallel"
    row = measure_step_time.measure("dense", name, measure_step_time.TWO[name])
    for phase in ("teacher", "update"):
        assert row.measured[phase] > 0 and row.predicted[phase] > 0
    assert row.predicted["update"] > row.predicted["teacher"]

"""Outliers of u."""

from __future__ import annotations

import json

import pytest
import torch

from asd_megatron.antisd import OutlierLimit, without_outliers


def test_beyond_the_limit_u_is_0() -> None:
    u = torch.tensor([0.5, -2.0, 2.001, -7.0, 0.0])
    assert without_outliers(u, 2.0).tolist() == [0.5, -2.0, 0.0, 0.0, 0.0]
    assert without_outliers(u, None) is u


def test_the_limit_is_measured_in_the_first_steps_that_have_u_and_survives_a_resume() -> None:
    outliers = OutlierLimit(2.0, 3)
    for deviation in (1.0, None, 2.0):
        outliers.record(deviation)
        assert outliers.measuring and outliers.limit is None
    resumed = OutlierLimit(2.0, 3)
    resumed.load_state_dict(json.loads(json.dumps(outliers.state_dict())))
    resumed.record(6.0)
    assert not resumed.measuring and resumed.limit == pytest.approx(2 * 3.0)
    resumed.record(100.0)
    assert resumed.limit == pytest.approx(2 * 3.0)
    for bad in ((0.0, 3), (2.0, 0)):
        with pytest.raises(ValueError):
            OutlierLimit(*bad)

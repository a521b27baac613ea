"""Reports of steps in the background: one at a time, in order, errors at the next call."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from asd_megatron.errors import UserError
from asd_megatron.run.reports import StepReports
from tests.config.test_checks import make


def test_steps_are_reported_in_order_and_an_error_is_raised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reports = StepReports(make(""), None, None, has_term=False)  # type: ignore[arg-type]
    going, done = threading.Event(), []

    def report(step: Any) -> None:
        assert going.wait(10)
        if step == 2:
            raise UserError("no space")
        done.append(step)

    monkeypatch.setattr(reports, "_report", report)
    reports.submit(1)  # type: ignore[arg-type]
    assert done == []  # the caller is not held up
    going.set()
    reports.submit(2)  # type: ignore[arg-type]
    assert done == [1]
    with pytest.raises(UserError, match="no space"):
        reports.submit(3)  # type: ignore[arg-type]
    reports.finish()
    reports.submit(4)  # type: ignore[arg-type]
    reports.close()
    assert done == [1, 4]

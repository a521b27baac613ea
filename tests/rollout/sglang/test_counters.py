"""Metrics of servers and weight updates."""

from __future__ import annotations

import pytest

from asd_megatron.rollout.sglang.client.requests import Counters
from asd_megatron.rollout.sglang.counters import Readings
from asd_megatron.rollout.sglang.weight_sync.synchronise import SyncReport


def test_updates_add_up_and_what_is_served_is_repeated() -> None:
    readings = Readings()
    readings.add(SyncReport({}, (), bytes=3_000_000, tensors=9, seconds=0.5, checked=18, probe=2e-6))
    failed = {"http://a": "broken"}
    readings.add(SyncReport(failed, (), bytes=3_000_000, tensors=9, seconds=1.0, checked=9, probe=None))
    first = readings.take(Counters(retried=3), serving=1, restarts=1)
    assert first["weight_sync/seconds"] == 1.5 and first["weight_sync/megabytes"] == 6.0
    assert first["weight_sync/gb_per_second"] == pytest.approx(0.004) and first["weight_sync/failures"] == 1
    assert (first["weight_sync/receipt_ok"], first["weight_sync/checked"]) == (1, 9)
    assert (first["servers/retried"], first["servers/restarts"], first["servers/serving"]) == (3, 1, 1)
    second = readings.take(Counters(retried=5), serving=2, restarts=1)
    assert second["weight_sync/receipt_ok"] == 1 and second["weight_sync/probe_max_abs"] == 2e-6
    assert "weight_sync/seconds" not in second and (second["servers/retried"], second["servers/restarts"]) == (2, 0)


def test_without_a_receipt_nothing_is_claimed() -> None:
    readings = Readings()
    readings.add(SyncReport({}, (), bytes=8, tensors=1, seconds=0.1, checked=0, probe=None))
    assert "weight_sync/receipt_ok" not in readings.take(Counters(), serving=1, restarts=0)

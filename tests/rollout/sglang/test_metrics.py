"""Metrics of servers and weight updates."""

from __future__ import annotations

import math

import pytest

from asd_megatron.rollout.sglang.client.requests import Counters
from asd_megatron.rollout.sglang.metrics import ServerMetrics
from asd_megatron.rollout.sglang.weight_sync.synchronise import SyncReport
from asd_megatron.rollout.sglang.weight_sync.verification import ProbeDifference

PROBES = {"http://a": ProbeDifference(1e-6, 2e-6, False), "http://b": ProbeDifference(4e-6, 5e-6, True)}


def test_updates_add_up_and_what_is_served_is_repeated() -> None:
    metrics = ServerMetrics()
    metrics.add(SyncReport({}, (), bytes=3_000_000, tensors=9, seconds=0.5, checked=18, probes=PROBES))
    failed = {"http://a": "broken"}
    metrics.add(SyncReport(failed, (), bytes=3_000_000, tensors=9, seconds=1.0, checked=9, probes={}), changed=0.01)
    first = metrics.take(Counters(retried=3), serving=1, restarts=1, unrouted=2)
    assert first["weight_sync/seconds"] == 1.5 and first["weight_sync/megabytes"] == 6.0
    assert first["weight_sync/gb_per_second"] == pytest.approx(0.004) and first["weight_sync/failures"] == 1
    assert (first["weight_sync/verified"], first["weight_sync/checked"]) == (1, 9)
    assert (first["servers/retried"], first["servers/restarts"], first["servers/serving"]) == (3, 1, 1)
    assert first["servers/unrouted"] == 2
    second = metrics.take(Counters(retried=5), serving=2, restarts=1, unrouted=6)
    assert second["weight_sync/verified"] == 1 and second["weight_sync/probe_exceeded"] == 1
    assert (second["weight_sync/probe_mean_abs"], second["weight_sync/probe_max_abs"]) == (4e-6, 5e-6)  # the worst
    assert "weight_sync/seconds" not in second and (second["servers/retried"], second["servers/restarts"]) == (2, 0)
    assert second["servers/unrouted"] == 4 and second["weight_sync/changed"] == 0.01


def test_the_worst_of_several_servers_may_be_no_number() -> None:
    metrics = ServerMetrics()
    probes = {**PROBES, "http://c": ProbeDifference(float("nan"), float("nan"), True)}
    metrics.add(SyncReport({}, (), bytes=8, tensors=1, seconds=0.1, checked=1, probes=probes))
    found = metrics.take(Counters(), serving=1, restarts=0, unrouted=0)
    assert math.isnan(found["weight_sync/probe_mean_abs"]) and found["weight_sync/probe_exceeded"] == 2


def test_without_verification_nothing_is_claimed() -> None:
    metrics = ServerMetrics()
    metrics.add(SyncReport({}, (), bytes=8, tensors=1, seconds=0.1, checked=0, probes={}))
    assert "weight_sync/verified" not in metrics.take(Counters(), serving=1, restarts=0, unrouted=0)

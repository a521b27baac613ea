"""The metrics of servers and weight updates."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from asd_megatron.rollout.sglang.client.requests import Counters
from asd_megatron.rollout.sglang.weight_sync.synchronise import SyncReport


class ServerMetrics:
    """Metrics of the servers since the last step, from the reports of weight updates and the fleet's counters.

    Metrics of the weights being served (`verified`, `checked`, `changed`, `probe_*`) are repeated in steps without an
    update.
    """

    def __init__(self) -> None:
        self._reports: list[SyncReport] = []
        self._served: dict[str, float] = {}
        self._counted: dict[str, int] = {}

    def add(self, report: SyncReport, changed: float | None = None) -> None:
        """`changed`: the fraction of elements that the update sent, where it may have been a delta."""
        self._reports.append(report)
        if changed is not None:
            self._served["weight_sync/changed"] = changed
        if report.checked:
            self._served["weight_sync/verified"] = 1.0  # a difference would have raised
            self._served["weight_sync/checked"] = float(report.checked)
        if probes := report.probes.values():
            self._served |= {
                "weight_sync/probe_mean_abs": _largest(probe.mean for probe in probes),
                "weight_sync/probe_max_abs": _largest(probe.maximum for probe in probes),
                "weight_sync/probe_exceeded": float(sum(probe.exceeded for probe in probes)),
            }

    def take(self, counters: Counters, *, serving: int, restarts: int, unrouted: int) -> dict[str, float]:
        """The metrics by name. `counters`, `restarts` and `unrouted` count since the start, `serving` servers serve
        now."""
        reports, self._reports = self._reports, []
        metrics = {**self._served, "servers/serving": float(serving)}
        if reports:
            seconds, sent = sum(r.seconds for r in reports), sum(r.bytes for r in reports)
            metrics |= {
                "weight_sync/seconds": seconds,
                "weight_sync/megabytes": sent / 1e6,
                "weight_sync/gb_per_second": sent / 1e9 / max(seconds, 1e-9),
                "weight_sync/failures": float(sum(len(r.failures) for r in reports)),
            }
        counted = {**dataclasses.asdict(counters), "restarts": restarts, "unrouted": unrouted}
        for name, total in counted.items():
            metrics[f"servers/{name}"] = float(total - self._counted.get(name, 0))
        self._counted = counted
        return metrics


def _largest(values: Iterable[float]) -> float:
    """NaN if one of them is."""
    return max(values, key=lambda value: (value != value, value))

"""What servers and weight updates did since the last reading, by metric name."""

from __future__ import annotations

import dataclasses

from asd_megatron.rollout.sglang.client.requests import Counters
from asd_megatron.rollout.sglang.weight_sync.synchronise import SyncReport


class Readings:
    """Collects the reports of weight updates; `take` makes metrics of them and of the fleet's counters.

    What describes the weights now served (`receipt_ok`, `probe_max_abs`) is told again in steps without an update.
    """

    def __init__(self) -> None:
        self._reports: list[SyncReport] = []
        self._served: dict[str, float] = {}
        self._counted: dict[str, int] = {}

    def add(self, report: SyncReport) -> None:
        self._reports.append(report)
        if report.checked:
            self._served["weight_sync/receipt_ok"] = 1.0  # it would have raised
            self._served["weight_sync/checked"] = float(report.checked)
        if report.probe is not None:
            self._served["weight_sync/probe_max_abs"] = report.probe

    def take(self, counters: Counters, *, serving: int, restarts: int) -> dict[str, float]:
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
        counted = {**dataclasses.asdict(counters), "restarts": restarts}
        for name, total in counted.items():
            metrics[f"servers/{name}"] = float(total - self._counted.get(name, 0))
        self._counted = counted
        return metrics

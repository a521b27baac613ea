"""Measurements of all ranks as the metrics of a step: one small gather, no Python objects."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist

from asd_megatron.observe.hardware_names import MEASURED_PHASES

Reduction = Callable[[Sequence[float]], float]
NAN = float("nan")


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def busiest_over_mean(values: Sequence[float]) -> float:
    """1 where nobody had anything to do."""
    return max(values) / mean(values) if any(values) else 1.0


REDUCTIONS: dict[str, dict[str, Reduction]] = {
    "perf/imbalance": {"": busiest_over_mean},
    "gpu/utilization": {"": mean, "_min": min},
    "gpu/memory_used_gib": {"": mean, "_max": max},
    "gpu/power_w": {"": mean},
    "gpu/energy_kj": {"": math.fsum},
    "gpu/temperature_c": {"": mean, "_max": max},
    "gpu/sm_clock_mhz": {"": mean, "_min": min},
    "gpu/throttled": {"": mean, "_max": max},
    "gpu/ecc_uncorrected": {"": math.fsum},
    "gpu/nvlink_gbps": {"": mean},
    "gpu/sm_active": {"": mean, "_min": min},
    "gpu/tensor_active": {"": mean},
    "gpu/dram_active": {"": mean},
    "memory/peak_gib": {"": max},
    "memory/reserved_gib": {"": max},
    **{f"memory/peak_gib_{phase}": {"": max} for phase in MEASURED_PHASES},
}
"""Of every measurement, which numbers of all ranks become metrics: the suffix of the name, and the function."""
SUMS = ("flops", "hardware_flops", "tokens")
"""Parts of which the sum over the ranks counts; no metrics themselves."""
_ORDER = (*SUMS, *REDUCTIONS)


def over_ranks(
    values: Mapping[str, float], group: dist.ProcessGroup
) -> tuple[dict[str, float], dict[str, float]] | None:
    """(the sums, the metrics) of this step's measurements of all ranks, on group rank 0; None elsewhere. `group` works
    on the CPU. Collective.

    `values`: this rank's, by names of `SUMS` and `REDUCTIONS`; what a rank does not have counts in no mean. Raises
    KeyError for other names.
    """
    unknown = values.keys() - set(_ORDER)
    if unknown:
        raise KeyError(f"observe/reduction.py does not know {', '.join(sorted(unknown))}")
    own = torch.tensor([values.get(name, NAN) for name in _ORDER], dtype=torch.float64)
    rows = [own]
    if group.size() > 1:
        rows = [torch.empty_like(own) for _ in range(group.size())] if group.rank() == 0 else []
        dist.gather(own, rows or None, group=group, group_dst=0)
    if group.rank() != 0:
        return None
    known = {
        name: [value for value in column if not math.isnan(value)]
        for name, column in zip(_ORDER, torch.stack(rows, 1).tolist(), strict=True)
    }
    metrics = {
        name + suffix: float(reduction(known[name]))
        for name, reductions in REDUCTIONS.items()
        if known[name]
        for suffix, reduction in reductions.items()
    }
    return {name: math.fsum(known[name]) for name in SUMS}, metrics

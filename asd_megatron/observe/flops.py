"""Peak rates of GPUs, and a step's metrics of the model's arithmetic (`models.flops` counts it)."""

from __future__ import annotations

import re
from collections.abc import Mapping

TERA = 1e12
# Dense rates (without sparsity) of the vendor's data sheets in TFLOP/s: of bfloat16, and of FP8 where there is any. The
# first pattern that is found in the device's name decides.
PEAKS: tuple[tuple[str, float, float | None], ...] = (
    (r"\bH[128]00.*\bNVL\b", 835.0, 1671.0),
    (r"\bH[18]00.*\bPCIe\b", 756.0, 1513.0),
    (r"\bG?H[128]00\b", 989.0, 1979.0),
    (r"\bH20\b", 148.0, 296.0),
    (r"\bA[18]00\b", 312.0, None),
    (r"\bL40S\b", 362.0, 733.0),
    (r"\bB200\b", 2250.0, 4500.0),
)


def peak_flops(device: str, arithmetic: str) -> float | None:
    """FLOP/s of a GPU by its name in `bfloat16` or `fp8`, at its highest clock; None for names that are not known, for
    parts of a GPU (MIG) and for other arithmetic, or what it does not have."""
    if "MIG" in device or arithmetic not in ("bfloat16", "fp8"):
        return None
    for pattern, bfloat16, fp8 in PEAKS:
        if re.search(pattern, device):
            rate = bfloat16 if arithmetic == "bfloat16" else fp8
            return None if rate is None else rate * TERA
    return None


# ---------------------------------------------------------------- metrics

MODEL_PHASES = ("teacher", "student", "reference", "update")
"""The phases of a step whose packs are counted."""
WAITING_PHASES = ("rollout", "reward", "weight_sync")


def rates(
    *,
    model_flops: float,
    hardware_flops: float,
    tokens: float,
    times: Mapping[str, float],
    gpus: int,
    peak: float | None,
) -> dict[str, float]:
    """Metrics `perf/*` of a step. FLOPs and tokens are those of all ranks; `times` are seconds by phase, with `total`;
    `peak` is one GPU's in FLOP/s, None: not known."""
    found: dict[str, float] = {}
    seconds = sum(times.get(phase, 0.0) for phase in MODEL_PHASES)
    if seconds > 0:
        found["perf/tflops_per_gpu"] = model_flops / seconds / gpus / TERA
        found["perf/tokens_per_second_per_gpu"] = tokens / seconds / gpus
        if peak is not None:
            found["perf/mfu"] = model_flops / (seconds * gpus * peak)
            found["perf/hfu"] = hardware_flops / (seconds * gpus * peak)
    if times.get("total", 0.0) > 0 and "rollout" in times:
        found["perf/idle_fraction"] = sum(times.get(phase, 0.0) for phase in WAITING_PHASES) / times["total"]
    return found

"""Rates of the machine at hand, measured in a few seconds: the accelerator of a plan that is to be compared with it."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from asd_megatron.distributed import device
from asd_megatron.models.attention import scaled_dot_product
from asd_megatron.planner.hardware import ACCELERATORS, GIB, Accelerator, Efficiency
from asd_megatron.planner.setting import BYTES, Dtype

SECONDS = 0.6  # of each measurement
SIZES = {"cuda": 8192, "cpu": 768}
"""Of the square matrices that are multiplied."""
STREAMED = {"cuda": 1 << 30, "cpu": 64 << 20}
"""Bytes that are copied: more than a cache holds."""
HEADS, HEAD_DIM, TOKENS = 8, 64, {"cuda": 8192, "cpu": 384}
LINK_BYTES = {"cuda": 256 << 20, "cpu": 4 << 20}


@dataclass(frozen=True)
class Measured:
    """FLOP/s of matrix products and of causal attention, bytes/s of memory (reads and writes together), seconds of an
    operator on a few numbers."""

    products: float
    attention: float
    memory: float
    launch: float


Clock = Callable[[], float]


def calibrate(
    dtype: Dtype = "bfloat16", group: dist.ProcessGroup | None = None, clock: Clock = time.perf_counter
) -> Accelerator:
    """This machine as an accelerator that reaches what is measured here.

    A GPU that the planner knows keeps its peak rates and prices, with the measured fractions of them; for any other
    device the measured rates are the peaks. `group`: ranks of this machine that measure at the same time, and also the
    link between them. Collective over it. `clock`: `time.process_time` on a CPU that others use too.
    """
    measured = measure(dtype, clock)
    known = _known_gpu()
    if known is None:
        found = _accelerator(measured)
    else:
        peak = known.bfloat16 if dtype == "bfloat16" else known.float32
        found = known.with_efficiency(
            matmul=measured.products / peak,
            attention=measured.attention / peak,
            memory=measured.memory / known.memory_rate,
        )
    if group is None or group.size() == 1:
        return found
    rate, latency = measure_link(group, clock)
    return replace(found, node_link=rate / found.efficiency.link, node_latency=latency)


def measure(dtype: Dtype, clock: Clock = time.perf_counter) -> Measured:
    """Rates of this rank's device."""
    place, torch_dtype = device.device(), getattr(torch, dtype)
    memory = _memory_rate(torch_dtype, clock)
    n, tokens = SIZES[place.type], TOKENS[place.type]
    a, b = (torch.randn(n, n, device=place).to(torch_dtype) for _ in range(2))
    # A product's own bytes are counted beside its FLOPs by the planner, so they are taken out here.
    spent = best_seconds(lambda: torch.mm(a, b), clock) - 3 * n * n * BYTES[dtype] / memory

    query, key, value = (torch.randn(1, HEADS, tokens, HEAD_DIM, device=place).to(torch_dtype) for _ in range(3))
    flops = 4.0 * HEADS * HEAD_DIM * tokens * (tokens + 1) / 2
    attended = best_seconds(lambda: scaled_dot_product(query, key, value, HEAD_DIM**-0.5), clock)

    few = torch.ones(16, dtype=torch_dtype, device=place)
    launched = best_seconds(lambda: [few.mul(2.0) for _ in range(100)], clock)
    return Measured(2.0 * n**3 / spent, flops / attended, memory, launched / 100)


def _memory_rate(dtype: torch.dtype, clock: Clock) -> float:
    """Bytes/s of copying more than a cache holds, reads and writes together."""
    place = device.device()
    source = torch.ones(STREAMED[place.type] // dtype.itemsize, dtype=dtype, device=place)
    target = torch.empty_like(source)
    return 2 * STREAMED[place.type] / best_seconds(lambda: target.copy_(source), clock)


def measure_link(group: dist.ProcessGroup, clock: Clock = time.perf_counter) -> tuple[float, float]:
    """(bytes/s of a rank, seconds of a collective of few bytes) of all-gathers over the group, as
    `communication.all_gather` counts them. Collective."""
    place, n = device.device(), group.size()

    def gather(size: int) -> float:
        own = torch.zeros(size // n, dtype=torch.uint8, device=place)
        complete = torch.empty(size // n * n, dtype=torch.uint8, device=place)
        return best_seconds(lambda: dist.all_gather_into_tensor(complete, own, group=group), clock, repeats=20)

    few, size = gather(64 * n), LINK_BYTES[place.type]
    seconds = max(gather(size) - few, 1e-9)
    return size * (n - 1) / n / seconds, few / math.ceil(math.log2(n))


def best_seconds(work: Callable[[], object], clock: Clock = time.perf_counter, *, repeats: int | None = None) -> float:
    """The shortest of some runs of `work`: of `repeats`, as many on all ranks, for collectives; else of what fits into
    `SECONDS`. The first one, which allocates, does not count."""
    work()
    _wait()
    best, end, done = math.inf, clock() + SECONDS, 0
    while done < (repeats or 3) or (repeats is None and clock() < end):
        started = clock()
        work()
        _wait()
        best, done = min(best, clock() - started), done + 1
    return best


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _known_gpu() -> Accelerator | None:
    """The planner's entry for this GPU."""
    if not torch.cuda.is_available():
        return None
    words = re.split(r"[\s-]+", torch.cuda.get_device_name().lower())
    alike = [gpu for gpu in ACCELERATORS.values() if gpu.name.partition("-")[0] in words]
    return min(alike, key=lambda gpu: abs(gpu.memory_gib - _memory_gib()), default=None)


def _memory_gib() -> float:
    """Of the device, or of the host where that is the device."""
    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / GIB)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB


def _accelerator(measured: Measured) -> Accelerator:
    """A device whose peaks are what was measured. Its links are those of memory, unless measured."""
    cuda = torch.cuda.is_available()
    return Accelerator(
        name=torch.cuda.get_device_name() if cuda else "cpu",
        memory_gib=_memory_gib(),
        bfloat16=measured.products,
        fp8=None,
        memory_rate=measured.memory,
        node_link=measured.memory,
        network=measured.memory,
        host_link=measured.memory,
        float32=measured.products,
        launch=measured.launch,
        cpu=not cuda,
        efficiency=Efficiency(matmul=1.0, attention=measured.attention / measured.products, memory=1.0, link=1.0),
    )

"""The metrics of the hardware: rates of the model's arithmetic, the GPUs, their memory (docs/telemetry.md)."""

from __future__ import annotations

from asd_megatron.observe.metric import Metric, Section

MEASURED_PHASES = ("rollout", "teacher", "student", "reference", "update", "evaluate", "checkpoint")
"""Phases that have a memory peak of their own."""

RATES = Section(
    "Model arithmetic",
    "Every training step, over the time of the phases `teacher`, `student`, `reference` and `update`. A GPU is a rank"
    " of the trainer. FLOPs are those of the model, without padding (docs/telemetry.md).",
    (
        Metric("perf/mfu", "fraction of the peak", "model FLOPs over what all GPUs could do; with a known GPU alone"),
        Metric("perf/hfu", "fraction of the peak", "the same with what activation recomputation computes again"),
        Metric("perf/tflops_per_gpu", "TFLOP/s", "model FLOPs a GPU"),
        Metric("perf/tokens_per_second_per_gpu", "tokens / s", "tokens of all passes a GPU, padding left out"),
        Metric(
            "perf/imbalance",
            "1",
            "FLOPs of the busiest data-parallel rank over the ranks' mean, recomputation included",
        ),
        Metric(
            "perf/idle_fraction",
            "fraction of the step",
            "time of the phases `rollout`, `reward` and `weight_sync`; reinforcement learning alone",
        ),
    ),
)
GPUS = Section(
    "GPUs",
    "With CUDA, nvidia-ml-py and `logging.telemetry auto`; means over the samples of the step and the trainer's GPUs"
    " unless stated. What a GPU or its driver does not report is left out.",
    (
        Metric("gpu/utilization", "fraction of time", "some kernel was running, however small"),
        Metric("gpu/utilization_min", "fraction of time", "the same of the least used GPU"),
        Metric("gpu/memory_used_gib", "GiB", "memory in use, by all processes of the GPU"),
        Metric("gpu/memory_used_gib_max", "GiB", "the same of the fullest GPU"),
        Metric("gpu/power_w", "W", "power of a GPU"),
        Metric("gpu/energy_kj", "kJ", "energy of all GPUs in the step, by the difference of their counters"),
        Metric("gpu/temperature_c", "degrees Celsius", "temperature"),
        Metric("gpu/temperature_c_max", "degrees Celsius", "the same of the hottest GPU"),
        Metric("gpu/sm_clock_mhz", "MHz", "clock of the multiprocessors"),
        Metric("gpu/sm_clock_mhz_min", "MHz", "the same of the slowest GPU"),
        Metric(
            "gpu/throttled",
            "fraction of samples",
            "clocks held down by power cap, temperature, power brake or another slowdown; the log names the reasons",
        ),
        Metric("gpu/throttled_max", "fraction of samples", "the same of the GPU with the most"),
        Metric("gpu/ecc_uncorrected", "errors", "uncorrected memory errors since the driver was loaded, all GPUs"),
        Metric("gpu/nvlink_gbps", "GB/s", "data over NVLink, both directions, of a GPU"),
        Metric("gpu/sm_active", "fraction", "multiprocessors that were busy (Hopper and later)"),
        Metric("gpu/sm_active_min", "fraction", "the same of the least busy GPU"),
        Metric("gpu/tensor_active", "fraction of time", "tensor cores that were busy (Hopper and later)"),
        Metric("gpu/dram_active", "fraction", "memory bandwidth in use (Hopper and later)"),
    ),
)
MEMORY = Section(
    "GPU memory",
    "With CUDA. What PyTorch has allocated, of the GPU with the most; a phase that did not run is left out.",
    (
        Metric("memory/peak_gib", "GiB", "largest allocation in the step"),
        Metric("memory/reserved_gib", "GiB", "largest reservation of the caching allocator"),
        *(
            Metric(f"memory/peak_gib_{phase}", "GiB", f"largest allocation in the phase `{phase}`")
            for phase in MEASURED_PHASES
        ),
    ),
)
SECTIONS = (RATES, GPUS, MEMORY)

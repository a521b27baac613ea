"""What a run measures of the hardware: its GPUs, their memory, the rate of the model's arithmetic; and its traces."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, nullcontext

import torch

from asd_megatron.config import AnyRecipe
from asd_megatron.distributed.layout import Layout, ProcessGroups
from asd_megatron.distributed.objects import on_rank_zero
from asd_megatron.models.flops import computed_tokens, flops_model, step_flops
from asd_megatron.models.gpt import Recompute
from asd_megatron.models.port import ModelPort
from asd_megatron.observe.flops import peak_flops, rates
from asd_megatron.observe.gpu import GpuTelemetry, open_gpu
from asd_megatron.observe.nvml import NvmlUnavailable
from asd_megatron.observe.profiler import recorded
from asd_megatron.observe.prometheus import MetricsServer
from asd_megatron.observe.reduction import over_ranks
from asd_megatron.records import ComputedPacks
from asd_megatron.run.clock import Clock
from asd_megatron.run.folder import PROFILE, writing


class Telemetry:
    """The measurements of one rank."""

    def __init__(
        self, recipe: AnyRecipe, port: ModelPort, layout: Layout, process_groups: ProcessGroups, clock: Clock
    ) -> None:
        self.recipe, self.process_groups, self.clock = recipe, process_groups, clock
        recompute = Recompute(recipe.model.recompute, recipe.model.recompute_layers)
        self.flops = flops_model(port.shape, recompute, layout.pipeline * (layout.virtual_pipeline or 1))
        self._ranks_per_pack = layout.tensor * layout.pipeline * layout.context  # ranks that count the same packs
        self._peak: float | None = None
        self._gpu: GpuTelemetry | None = None
        self._server: MetricsServer | None = None
        self._dtype = port.dtype

    def serve(self, closing: ExitStack) -> None:
        """Open `logging.prometheus_port` until `closing` closes. Global rank 0 only. Raises UserError when it cannot be
        used."""
        port = self.recipe.logging.prometheus_port
        if port is not None:
            self._server = MetricsServer(port, self.recipe.run.name)
            closing.callback(self._server.close)

    def watch(self, closing: ExitStack) -> list[str]:
        """Begin to sample this rank's GPU until `closing` closes. Returns lines for the console about what is missing;
        [] without CUDA, where there is nothing to sample."""
        if not torch.cuda.is_available():
            return []
        settings, lines = self.recipe.logging, []
        name = torch.cuda.get_device_name()
        arithmetic = "fp8" if self.recipe.precision.recipe.enabled else str(self._dtype).removeprefix("torch.")
        self._peak = peak_flops(name, arithmetic)
        if self._peak is None:
            lines.append(f"telemetry: no perf/mfu, the peak rate of {name} in {arithmetic} is not known")
        if settings.telemetry == "auto":
            try:
                self._gpu = open_gpu(seconds=settings.telemetry_seconds)
                closing.callback(self._gpu.close)
            except NvmlUnavailable as reason:
                lines.append(f"telemetry: no gpu/* metrics, {reason}")
        return lines

    def steps(self, steps: Iterable[int]) -> Iterator[int]:
        """The steps one by one, those of `run.profile_steps` recorded on global rank 0. A step that fails leaves no
        trace. Collective; raises UserError on every rank when a trace cannot be written."""
        if self._gpu is not None:
            self._gpu.take()  # what was sampled before the first step
        profiled = set(self.recipe.run.profile_steps or ())
        for step in steps:
            if step in profiled:
                yield from self._recorded(step)
            else:
                yield step

    def _recorded(self, step: int) -> Iterator[int]:
        folder = self.recipe.run.path / PROFILE
        with recorded() if self.process_groups.world.rank() == 0 else nullcontext() as write:
            yield step

        def write_trace() -> None:
            assert write is not None  # on global rank 0
            with writing(folder):
                write(folder, step, 0)

        with self.clock.seconds("profile"):
            on_rank_zero(write_trace, self.process_groups.host)

    def of_step(
        self, times: Mapping[str, float], packs: ComputedPacks, *, recomputed_heads: int = 0
    ) -> dict[str, float]:
        """Metrics `perf/*`, `gpu/*` and `memory/*` of the step that `clock.take` has ended, on global rank 0; {}
        elsewhere. Collective. times: of `clock.take`. packs: this data-parallel rank's.

        Ranks of one model copy hold parts of the same packs: each counts its part of them.
        """
        model, hardware = step_flops(self.flops, packs, recomputed_heads)
        own = {"flops": model, "hardware_flops": hardware, "tokens": computed_tokens(packs)}
        values = {name: value / self._ranks_per_pack for name, value in own.items()} | self.clock.peaks
        values["perf/imbalance"] = float(hardware)
        if self._gpu is not None:
            values |= self._gpu.take()
        found = over_ranks(values, self.process_groups.host)
        if found is None:
            return {}
        sums, metrics = found
        return metrics | rates(
            model_flops=sums["flops"],
            hardware_flops=sums["hardware_flops"],
            tokens=sums["tokens"],
            times=times,
            gpus=self.process_groups.world.size(),
            peak=self._peak,
        )

    def publish(self, step: int, metrics: Mapping[str, float]) -> None:
        """Serve a step's metrics at `logging.prometheus_port`."""
        if self._server is not None:
            self._server.publish(step, metrics)

"""Section `logging`: what a run shows while it runs."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from asd_megatron.config.base import Section


class LoggingSection(Section):
    """Metrics always go to `metrics.jsonl`; these keys add to it."""

    tensorboard: bool = Field(True, description="Write the metrics for TensorBoard as well.")
    curves: bool = Field(True, description="Draw the metrics into `curves.png` at the end.")
    progress: bool = Field(True, description="Show a progress bar (on a terminal) or progress lines (elsewhere).")
    level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe messages shown.")
    telemetry: Literal["auto", "off"] = Field(
        "auto",
        description=(
            "Sample the trainer's GPUs (`gpu/*`): `auto` where there are any and nvidia-ml-py is installed, or `off`."
        ),
    )
    telemetry_seconds: float = Field(1.0, ge=0.1, le=3600, description="Seconds between two samples of a GPU.")
    prometheus_port: int | None = Field(
        None,
        ge=1,
        le=65535,
        description=(
            "Port on 127.0.0.1 of global rank 0's machine at which the last step's metrics are served for Prometheus"
            " (`/metrics`); null: none."
        ),
    )

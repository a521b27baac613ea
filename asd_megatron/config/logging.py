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

"""The load of a mixture of experts: RUN/expert_load.jsonl, and its summary in the metrics. Rank 0 only."""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor

from asd_megatron.observe.lines import LineFile

EXPERT_LOAD_FILE = "expert_load.jsonl"


class ExpertLoadFile:
    """Appends `{"step": 7, "tokens": [[...], ...]}` a step: how many response tokens each expert of each layer got.

    `resume_step`, errors, and what happens while the disk is full: as of any `LineFile`.
    """

    def __init__(self, folder: str | os.PathLike[str], *, resume_step: int | None = None) -> None:
        self._lines = LineFile(Path(folder) / EXPERT_LOAD_FILE, resume_step=resume_step)

    def write(self, step: int, tokens: Tensor) -> str | None:
        """tokens: [layers, experts]. Returns a message for the console, if any."""
        return self._lines.write({"step": step, "tokens": tokens.round().long().tolist()})

    def write_waiting(self) -> None:
        """Write the lines that wait for room. Raises OSError when they cannot be written."""
        self._lines.write_waiting()

    def close(self) -> None:
        """Raises OSError for lines that still wait and cannot be written."""
        self._lines.close()


def load_metrics(fractions: Tensor, entropy: Tensor, auxiliary_loss: float) -> dict[str, float]:
    """Metrics `experts/*` of a step. fractions [layers, experts] of each layer's choices, entropy [layers] relative to
    that of a balanced load."""
    busiest = fractions.amax(1)
    metrics = {
        "experts/auxiliary_loss": auxiliary_loss,
        "experts/entropy": float(entropy.mean()),
        "experts/busiest": float(busiest.max()),
        "experts/idle": float((fractions == 0).sum()),
    }
    for layer, (of_layer, most) in enumerate(zip(entropy.tolist(), busiest.tolist(), strict=True)):
        metrics[f"experts/entropy_{layer:02d}"] = of_layer
        metrics[f"experts/busiest_{layer:02d}"] = most
    return metrics

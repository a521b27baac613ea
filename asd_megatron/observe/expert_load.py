"""The load of a mixture of experts: RUN/expert_load.jsonl, and its summary in the metrics. Rank 0 only."""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor

from asd_megatron.files import atomic_write, to_json
from asd_megatron.observe.writer import read_lines

EXPERT_LOAD_FILE = "expert_load.jsonl"


class ExpertLoadFile:
    """Appends `{"step": 7, "tokens": [[...], ...]}` a step: how many response tokens each expert of each layer got.

    `resume_step` None starts a new file; resuming from the state after step s drops later lines, and a torn last one.
    UserError for a damaged line before them.
    """

    def __init__(self, folder: str | os.PathLike[str], *, resume_step: int | None = None) -> None:
        self.path = Path(folder) / EXPERT_LOAD_FILE
        kept = []
        if resume_step is not None and self.path.is_file():
            kept = [to_json(row) for row in read_lines(self.path) if row["step"] <= resume_step]
        atomic_write(self.path, "".join(f"{line}\n" for line in kept))

    def write(self, step: int, tokens: Tensor) -> None:
        """tokens: [layers, experts]."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(to_json({"step": step, "tokens": tokens.round().long().tolist()}) + "\n")


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

"""The host memory that a rank needs to save and to load, beside the model: at most 1.3 times its own part."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

from asd_megatron.checkpoint import training
from asd_megatron.checkpoint.background import Background
from tests.checkpoint.trainer import RUN_STATE, Trainer
from tests.distributed.harness import run_ranks

TOOL = Path(__file__).parents[2] / "tools" / "benchmark_checkpoint.py"
SIZES = {"hidden_size": 512, "intermediate_size": 1536, "head_dim": 64, "num_attention_heads": 8, "vocab_size": 4096}


def _peaks(rank: int, folder: str) -> dict[str, float]:
    """Growth of resident memory as a multiple of this rank's part."""
    peak = runpy.run_path(str(TOOL))["peak"]
    root = Path(folder)
    trainer = Trainer({"data": 2}, True, 1, torch.bfloat16, **SIZES)
    trainer.steps(range(1))
    background = Background(trainer.port.process_groups)
    part = 14 * sum(p.numel() for _, p in trainer.port.named_weights()) / 2 / 1e6
    assert part > 80

    def in_background() -> None:
        arguments = (trainer.port, trainer.optimizer, trainer.scheduler, RUN_STATE)
        training.save(root, 2, *arguments, background=background)
        background.settle()

    found = {
        "save": peak(lambda: trainer.save(root, 1)),
        "background": peak(in_background),
        "load": peak(lambda: trainer.load(root / "step_000002")),
    }
    background.close()
    return {name: megabytes / part for name, (megabytes, _) in found.items()}


def test_a_rank_needs_memory_for_its_own_part_alone(tmp_path: Path) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the system does not reset a process's peak memory")
    for found in run_ranks(_peaks, 2, str(tmp_path)):
        assert found["save"] < 0.5 and found["load"] < 0.9 and 0.8 < found["background"] < 1.3, found

"""Checkpoints of models whose parameters are sharded in other ways: experts, norms over sharded projections."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from asd_megatron.checkpoint import lineage
from tests.checkpoint.trainer import MOE, Trainer
from tests.distributed.harness import run_ranks

OLMO3: dict[str, Any] = {"architectures": ["Olmo3ForCausalLM"], "model_type": "olmo3", "sliding_window": 8}
TENSOR: dict[str, Any] = {"tensor": 2, "sequence_parallel": True}
# Model, whether the optimizer is distributed, the layout that writes, those that read.
CASES: list[tuple[dict[str, Any], bool, dict[str, Any], list[dict[str, Any]]]] = [
    (
        MOE,
        True,
        {"data": 2, "expert": 2},
        [{"data": 2, "expert": 2}, {"data": 2}, {"pipeline": 2}, {**TENSOR, "expert": 2}],
    ),
    (MOE, True, {"pipeline": 2, "virtual_pipeline": 2}, [{"data": 2, "expert": 2}]),
    (MOE, True, TENSOR, [{"context": 2, "expert": 2}]),
    (OLMO3, True, TENSOR, [{"data": 2}, {"pipeline": 2}]),
    (MOE, False, {"data": 2, "expert": 2}, [{"pipeline": 2}]),
    (OLMO3, False, TENSOR, [{"data": 2}]),
]


def _resharded(rank: int, folder: str) -> dict[str, float]:
    report = {}
    for number, (config, distributed, written, others) in enumerate(CASES):
        path = Path(folder) / str(number)
        first = Trainer(written, distributed, seed=1, copies=True, **config)
        first.steps(range(2))
        first.save(path, 2)
        first.steps(range(2, 4))
        want = first.weights() | first.kept()
        for layout in others:
            again = Trainer(layout, distributed, seed=2, copies=True, **config)
            again.load(lineage.latest(path))
            again.steps(range(2, 4))
            got = again.weights() | again.kept()
            error = max((got[n] - want[n]).abs().max().item() for n in want)
            report[f"{number} {config['model_type']} {written} {layout}"] = error
    return report


def test_any_layout_resumes(tmp_path: Path) -> None:
    report = run_ranks(_resharded, 2, str(tmp_path), timeout=240)[0]
    assert len(report) == sum(len(others) for *_, others in CASES)
    for case, error in report.items():
        assert error < 1e-6, case
        if "'data': 2, 'expert': 2} {'data': 2, 'expert': 2}" in case:
            assert error == 0.0

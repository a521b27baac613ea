"""Counted parameters against those of real models."""

from __future__ import annotations

from typing import Any

from asd_megatron.distributed.layout import Layout
from asd_megatron.planner.parameters import stage_parameters
from tests.planner.counted import counted, parameters
from tests.planner.settings import shape

LAYOUTS: dict[str, list[dict[str, Any]]] = {
    "Qwen3-4B": [{}, {"tensor": 4, "pipeline": 2, "data": 2}, {"pipeline": 2, "virtual_pipeline": 3}],
    "Qwen3-8B": [{"tensor": 8, "sequence_parallel": True, "context": 2}, {"tensor": 2, "pipeline": 4}],
    "Olmo-3-7B-Think": [{"tensor": 4, "sequence_parallel": True, "pipeline": 2, "virtual_pipeline": 2}],
    "Qwen2.5-7B": [{"tensor": 4}],  # biases
    "SmolLM2-135M-Instruct": [{"tensor": 3, "pipeline": 2}],  # tied; no norm of queries and keys
    "Qwen3-30B-A3B": [
        {"tensor": 4, "sequence_parallel": True, "expert": 8, "data": 2},
        {"tensor": 2, "sequence_parallel": True, "pipeline": 3, "expert": 16, "data": 8},
    ],
}


def test_counts_are_those_of_the_models_built_at_true_size() -> None:
    cases = [
        (model, sizes, stage)
        for model, layouts in LAYOUTS.items()
        for sizes in layouts
        for stage in range(sizes.get("pipeline", 1))
    ]
    for (model, sizes, stage), built in zip(cases, counted(parameters, cases), strict=True):
        found = vars(stage_parameters(shape(model), Layout(**sizes))[stage])
        assert {kind: n for kind, n in found.items() if n} == built, (model, sizes, stage)

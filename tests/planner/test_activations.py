"""Formulas of saved activations against those that real layers save."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from asd_megatron.distributed.layout import Layout
from asd_megatron.models.families import shape_of
from asd_megatron.models.gpt import Recompute
from asd_megatron.planner.activations import Activations, in_flight, worst_expert_load
from asd_megatron.planner.setting import Dtype, Training
from tests.planner import models
from tests.planner.counted import counted, saved

TOKENS = 256
SPLIT = {"tensor": 2, "sequence_parallel": True}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], Dtype, Literal["none", "mlp", "full"]]] = {
    "dense": (models.dense(), {}, "bfloat16", "none"),
    "dense float32": (models.dense(), {}, "float32", "none"),
    "dense mlp": (models.dense(), {}, "bfloat16", "mlp"),
    "dense full": (models.dense(), {}, "bfloat16", "full"),
    "dense TP 2 with SP": (models.dense(), SPLIT, "bfloat16", "none"),
    "dense TP 2 with SP, mlp": (models.dense(), SPLIT, "bfloat16", "mlp"),
    "dense TP 2": (models.dense(), {"tensor": 2}, "float32", "none"),
    "dense CP 2": (models.dense(), {"context": 2}, "bfloat16", "none"),
    "no norm of queries and keys": (models.plain(), {}, "bfloat16", "none"),
    "post norm": (models.post_norm(), {}, "bfloat16", "none"),
    "windows": (models.post_norm(layer_types=["sliding_attention"] * 2), {}, "bfloat16", "none"),
    "post norm float32": (models.post_norm(), {}, "float32", "none"),
    "post norm mlp, TP 2 with SP": (models.post_norm(), SPLIT, "bfloat16", "mlp"),
    "experts": (models.experts(), {}, "bfloat16", "none"),
    "experts float32": (models.experts(), {}, "float32", "none"),
    "experts full": (models.experts(), {}, "bfloat16", "full"),
}


def test_local_layers_save_what_the_formulas_say() -> None:
    cases = [(config, sizes, dtype, kind, TOKENS) for config, sizes, dtype, kind in CASES.values()]
    wrong = {}
    for name, (config, sizes, dtype, kind, _), real in zip(CASES, cases, counted(saved, cases), strict=True):
        training = Training(Layout(**sizes), dtype=dtype, layers="local")
        shape = shape_of(config)[1]
        activations = Activations(shape, training, TOKENS // training.layout.context, TOKENS, on_cpu=True)
        found = activations.saved(Recompute(kind), shape.attention[0].window)
        if found != pytest.approx(real, rel=0.005):
            wrong[name] = (found / TOKENS, real / TOKENS)
    assert wrong == {}


def test_micro_batches_in_flight() -> None:
    """1F1B on 4 stages, and with 2 chunks each: the first stage has 3 * 2 + 4 forward passes before its first backward
    pass, and makes one more."""
    assert [in_flight(Layout(pipeline=4), stage, 9) for stage in range(4)] == [4, 3, 2, 1]
    assert in_flight(Layout(pipeline=4), 0, 2) == 2
    assert [in_flight(Layout(pipeline=4, virtual_pipeline=2), stage, 8) for stage in range(4)] == [11, 9, 7, 5]
    assert in_flight(Layout(pipeline=4, virtual_pipeline=2), 0, 4) == 8


def test_the_worst_load_of_experts() -> None:
    shape = shape_of(models.experts())[1]  # 2 of 8 experts a token
    assert worst_expert_load(shape, Layout(data=2, expert=2)) == 2
    assert worst_expert_load(shape, Layout(data=8, expert=8)) == 4  # one of a token's two choices at most is here

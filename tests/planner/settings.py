"""Settings that the planner's tests share."""

from __future__ import annotations

from functools import cache
from typing import Any

from asd_megatron.distributed.layout import Layout
from asd_megatron.models import published
from asd_megatron.models.families import shape_of
from asd_megatron.models.family import ModelShape
from asd_megatron.planner.hardware import accelerator
from asd_megatron.planner.setting import Lengths, Serving, Setting, Training, Workload

LONG_TAIL = Lengths(median=6000, most=32768, spread=1.0)
WORK = Workload(problems=32, samples=8, prompt=300, responses=LONG_TAIL, privileged=6000)


@cache
def shape(name: str) -> ModelShape:
    config = published.config_of(name)
    assert config is not None
    return shape_of(config)[1]


def setting(
    model: str = "Qwen3-8B",
    layout: Layout | None = None,
    *,
    gpu: str = "h100",
    work: Workload = WORK,
    serving: Serving | None = None,
    **training: Any,
) -> Setting:
    held = Training(layout or Layout(data=8), **training)
    return Setting(shape(model), held, serving or Serving(servers=8), work, accelerator(gpu))
